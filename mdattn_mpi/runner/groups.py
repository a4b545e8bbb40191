"""This rank's groups: one for each queue of the schedule, with its executor and its plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mdattn_mpi.backends import Executor
from mdattn_mpi.dataset import AnyItem
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep import Board, Group, World, together
from mdattn_mpi.planning.memory import usable_gpu_memory, usable_host_memory
from mdattn_mpi.planning.schedule import Schedule
from mdattn_mpi.problem import AnyPlan, digest_of

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.counter import SharedCounter

NO_ITEM = -1


@dataclass
class JobGroup:
    """The ranks that do one queue's items together with this rank: its group number `index`."""

    queue: int
    index: int
    group: Group
    executor: Executor
    complete: bool  # the world's last ranks may be too few; they leave the queue out
    plans: dict[str, AnyPlan] = field(default_factory=dict)

    @property
    def name(self) -> int:
        """By which the board tells groups apart."""
        return self.queue << 20 | self.index

    def join(self, board: Board) -> None:
        """Say that this rank works in this group now; all its ranks count from the same number."""
        board.join(self.name, counted=(self.queue + 1) << 32)

    def claim(
        self, schedule: Schedule, counter: SharedCounter | None, enter: Callable[[], None]
    ) -> Iterator[int]:
        """Collective in the group. Claim items of this queue until there are none.

        `enter` is called before each wait.
        """
        if counter is None:
            yield from schedule.queues[self.queue].items
            return
        items = schedule.items(self.queue, self.index, counter.claim)
        while True:
            enter()
            mine = next(items, NO_ITEM) if self.group.rank == 0 else NO_ITEM
            item = int(self.group.bcast_bytes(str(mine).encode()))
            if item == NO_ITEM:
                return
            yield item

    def plan(
        self,
        world: World,
        items: Sequence[AnyItem],
        choose: Callable[[Any], AnyPlan],
        file: str,
    ) -> None:
        """Collective in the world. Choose a plan for each problem that `items` pose.

        Raises
        ------
        RejectedError
            One of them can't be done; says which item of `file`.

        """

        def plan() -> dict[str, AnyPlan]:
            chosen: dict[Any, AnyPlan] = {}
            for item in items:
                if item.problem not in chosen:
                    try:
                        chosen[item.problem] = choose(item.problem)
                    except RejectedError as error:
                        error.item, error.file = item.name, file
                        raise
            return {item.name: chosen[item.problem] for item in items}

        def agree_on_plans() -> None:
            if self.complete:
                self.plans = together(self.group, "plan", plan, _plan_facts)

        together(world, "plan", agree_on_plans)


def _plan_facts(plans: dict[str, AnyPlan]) -> dict[str, Any]:
    return {"plans": digest_of({name: plan.digest for name, plan in plans.items()})}


def open_groups(
    world: World, schedule: Schedule, open_one: Callable[[Group], Executor]
) -> list[JobGroup]:
    """Collective. Make the groups of all queues and open their executors.

    `open_one` is collective in a group; what goes wrong in one of them is raised on all ranks.
    """
    groups = []
    for number, queue in enumerate(schedule.queues):
        place = schedule.order.index(world.rank)
        index = place // queue.size
        alone = queue.size == world.size and schedule.order == tuple(range(world.size))
        group = world if alone else world.split(index, place)
        complete = schedule.group(queue.size, world.rank) is not None
        executor = together(world, "backend", partial(open_one, group))
        groups.append(JobGroup(number, index, group, executor, complete))
    return groups


def memory_of_a_rank(backend: str, world: World) -> int:
    """Bytes that an item's shards may take on this rank."""
    if backend != "cpu":
        from mdattn_mpi.devices.presence import gpu_memory

        return usable_gpu_memory(gpu_memory())
    return usable_host_memory(world.local_size)
