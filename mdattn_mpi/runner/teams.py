"""This rank's groups: one for each queue of the schedule, with its engine and its plans."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mdattn_mpi.backends import Backend
from mdattn_mpi.devices.presence import gpu_memory
from mdattn_mpi.lockstep import Board, Group, World
from mdattn_mpi.lockstep.counter import SharedCounter
from mdattn_mpi.problem import Plan
from mdattn_mpi.runner.schedule import Schedule

NOBODY = -1
USABLE = 0.8  # of a GPU's memory; of the host's, half: the files' pages want some too


@dataclass
class Team:
    """The ranks that do one queue's items together with this rank."""

    queue: int
    group: Group
    backend: Backend
    complete: bool  # the world's last ranks may be too few; they leave the queue out
    name: int  # by which the board tells groups apart
    plans: dict[str, Plan] = field(default_factory=dict)

    def join(self, board: Board) -> None:
        """Say that this rank works in this group now; all its ranks count from the same number."""
        board.join(self.name, counted=(self.queue + 1) << 32)

    def turns(
        self, schedule: Schedule, counter: SharedCounter | None, enter: Callable[[], None]
    ) -> Iterator[int]:
        """Collective in the group. Take items of this queue until there are none.

        `enter` is called before each wait.
        """
        if counter is None:
            yield from schedule.queues[self.queue].items
            return
        items = schedule.items(self.queue, counter.take)
        while True:
            enter()
            mine = next(items, NOBODY) if self.group.rank == 0 else NOBODY
            item = int(self.group.bcast_bytes(str(mine).encode()))
            if item == NOBODY:
                return
            yield item


def open_teams(
    world: World, schedule: Schedule, open_one: Callable[[Group], Backend]
) -> list[Team]:
    """Collective. Make the groups of all queues and open their backends."""
    teams = []
    for number, queue in enumerate(schedule.queues):
        place = schedule.place(world.rank)
        index = place // queue.size
        alone = queue.size == world.size and schedule.order == tuple(range(world.size))
        group = world if alone else world.split(index, place)
        complete = schedule.group(queue.size, world.rank) is not None
        name = number << 20 | index
        teams.append(Team(number, group, open_one(group), complete, name))
    return teams


def memory_of_a_rank(backend: str, world: World) -> int:
    """Bytes that an item's shards may take on this rank."""
    if backend != "cpu":
        return int(gpu_memory() * USABLE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // (2 * world.local_size)


def smallest(world: World, number: int) -> int:
    """Collective. The smallest `number` of all ranks, everywhere."""
    gathered = world.gather_bytes(str(number).encode())
    least = min(map(int, gathered)) if gathered is not None else 0
    return int(world.bcast_bytes(str(least).encode() if world.rank == 0 else None))
