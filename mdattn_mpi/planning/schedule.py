"""Which ranks work together on which item, and in which order items are claimed.

Every item waits in the queue of its group size, the most expensive first. The world is cut into
groups of neighbouring ranks that serve one queue after the other, that of the largest groups first.
A group that finds its queue empty splits into smaller groups, which go on with the next queue;
nobody waits for the others. At the start every group has one of the most expensive items; then
whoever is free takes the next, so that the cheap ones at the end fill the gaps.

Which group does an item depends on timing. The bytes of its output don't: its group size follows
from the job and its options alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import gcd
from typing import Any

from mdattn_mpi.costs import Costs
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.estimate import enough_ranks, item_seconds, least_memory
from mdattn_mpi.problem import AnyProblem, digest_of
from mdattn_mpi.text import counted

Claim = Callable[[int], int]  # a queue's number -> 0, 1, 2, … each once among all groups
Time = Callable[[int, int], float]  # an item's number and its ranks -> seconds

# Items that the loop takes ahead: while one computes, one is begun and one is read.
AHEAD = 2

# `auto` lets no item last longer on its group than one of these shares of a rank's whole work. A
# group takes the next items before it has done one, so that two halves might come to the same.
SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 0.0)


@dataclass(frozen=True)
class Measure:
    """What an item takes of a group: of its problem, the ranks and the costs, by kind of work."""

    seconds: Callable[[Any, int, Costs], float]
    memory: Callable[[Any, int, Costs], int]  # bytes of each rank


ATTENTION = Measure(item_seconds, least_memory)


@dataclass(frozen=True)
class Queue:
    """Items for groups of ``size`` ranks, most expensive first."""

    size: int
    items: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """The whole job: who may work with whom, what is claimed in which order, and why.

    ``order`` lists the world's ranks, a node's ranks together; a group is a run of it that starts
    at a multiple of its size. ``sizes`` holds every item's group size, those of finished items
    too.
    """

    order: tuple[int, ...]
    queues: tuple[Queue, ...]
    sizes: tuple[int, ...]
    reasons: tuple[str, ...]

    @property
    def signature(self) -> str:
        """What a resumed job must have in common with the one before it."""
        first = self.sizes[0]
        if all(size == first for size in self.sizes):
            return "all" if first == len(self.order) else str(first)
        return f"auto {digest_of({'sizes': self.sizes}):016x}"

    @property
    def largest(self) -> int:
        """Ranks of the largest group."""
        return max(self.sizes)

    def only(self, items: Collection[int]) -> Schedule:
        """Leave out all items but these; sizes stay, so that a resumed job gives the same bytes."""
        kept = set(items)
        queues = tuple(
            Queue(queue.size, tuple(item for item in queue.items if item in kept))
            for queue in self.queues
        )
        return replace(self, queues=queues)

    def group(self, size: int, rank: int) -> tuple[int, ...] | None:
        """World ranks of the group of `size` that `rank` is in; its first is the leader.

        None where the world's last ranks are too few for such a group: they leave that queue out.
        """
        start = self.order.index(rank) // size * size
        return self.order[start : start + size] if start + size <= len(self.order) else None

    def items(self, queue: int, group: int, claim: Claim) -> Iterator[int]:
        """Items of `queue` for its group number `group`, until none is left; for its leader.

        The groups that begin the job have an item each to begin with, and claim the others: who
        comes first and claims two ahead would else have the three longest.
        """
        size, items = self.queues[queue].size, self.queues[queue].items
        dealt = 0
        if not any(before.items for before in self.queues[:queue]):
            dealt = len(self.order) // size
            yield from items[group:dealt][:1]
        while (turn := dealt + claim(queue)) < len(items):
            yield items[turn]


def make_schedule(
    problems: Sequence[AnyProblem],
    nodes: Sequence[str],
    group_size: str | int,
    costs: Costs,
    measure: Measure = ATTENTION,
) -> Schedule:
    """Choose every item's group size and the order in which items are claimed.

    The same arguments give the same schedule on every rank.

    Parameters
    ----------
    problems
        Of all items of the job, finished ones too: see `Schedule.only`.
    nodes
        The node that each rank of the world runs on.
    group_size
        Ranks a group, ``all`` of them, or ``auto``: by length.
    costs
        What a rank does how fast; `memory` is what the arrays of a group may take on it.
    measure
        What an item takes.

    Raises
    ------
    RejectedError
        The ranks can't be cut into groups of that size, or an item doesn't fit.

    """
    world = len(nodes)
    seconds = expected_seconds(problems, world, costs, measure)
    if group_size == "auto":
        sizes, reasons = _auto(problems, nodes, seconds, costs, measure)
    else:
        size = world if group_size == "all" else int(group_size)
        sizes, reasons = (size,) * len(problems), (_fixed(size, world),)
    return Schedule(_order(nodes), _queues(sizes, seconds), sizes, reasons)


def expected_seconds(
    problems: Sequence[AnyProblem], world: int, costs: Costs, measure: Measure = ATTENTION
) -> Time:
    """Estimate items by number and group size.

    Each group plans a shape once: items that are alike share what that takes, the less the fewer
    groups there are.
    """
    # By numbers of their own, because a problem's hash takes longer than all the rest.
    kinds = {problem: kind for kind, problem in enumerate(dict.fromkeys(problems))}
    kind_of = [kinds[problem] for problem in problems]
    distinct, alike = tuple(kinds), Counter(kind_of)

    @cache
    def of_kind(kind: int, size: int) -> float:
        planned = min(1.0, world // size / alike[kind])
        return measure.seconds(distinct[kind], size, costs) + planned * costs.preparing

    return lambda item, size: of_kind(kind_of[item], size)


def _fixed(size: int, world: int) -> str:
    if not 1 <= size <= world or world % size:
        sizes = [str(part) for part in range(1, world + 1) if world % part == 0]
        raise RejectedError(
            f"{world} ranks can't be cut into groups of {size}",
            fix=f"use --group-size {', '.join(sizes)} or auto, or a multiple of "
            f"{counted(max(size, 1), 'rank')}",
        )
    return f"{counted(world // size, 'group')} of {counted(size, 'rank')}"


def _order(nodes: Sequence[str]) -> tuple[int, ...]:
    """Ranks sorted by node, in the order in which nodes first appear."""
    first = {node: rank for rank, node in reversed(list(enumerate(nodes)))}
    return tuple(sorted(range(len(nodes)), key=lambda rank: (first[nodes[rank]], rank)))


def _queues(sizes: Sequence[int], seconds: Time) -> tuple[Queue, ...]:
    by_size: dict[int, list[int]] = {}
    for item, size in enumerate(sizes):
        by_size.setdefault(size, []).append(item)
    return tuple(
        Queue(size, tuple(sorted(by_size[size], key=lambda item: (-seconds(item, size), item))))
        for size in sorted(by_size, reverse=True)
    )


def ladder(nodes: Sequence[str]) -> tuple[int, ...]:
    """Group sizes that nest: parts of a node, a node, 2, 4, 8 … nodes, the world; ascending."""
    world, node = len(nodes), 0
    for ranks in Counter(nodes).values():
        node = gcd(node, ranks)
    inside = [node]
    while inside[-1] > 1:
        inside.append(_largest_part(inside[-1]))
    beyond = [node]
    while beyond[-1] * 2 < world:
        beyond.append(beyond[-1] * 2)
    return tuple(sorted({*inside, *beyond, world}))


def _largest_part(number: int) -> int:
    return next(part for part in range(number // 2, 0, -1) if number % part == 0)


def _auto(
    problems: Sequence[AnyProblem],
    nodes: Sequence[str],
    seconds: Time,
    costs: Costs,
    measure: Measure,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Simulate each of `SHARES`; take the one that ends first, small groups when in doubt.

    Where one ends within 1 % of the work shared evenly, no other is looked at: none is taken
    that isn't 1 % earlier, and larger groups make more work, not less.
    """
    rungs, world = ladder(nodes), len(nodes)
    floor_of = {
        problem: _floor(problem, rungs, costs, measure) for problem in dict.fromkeys(problems)
    }
    floors = [floor_of[problem] for problem in problems]
    order = _order(nodes)
    whole = sum(seconds(item, floor) * floor for item, floor in enumerate(floors)) / world
    best: tuple[float, tuple[int, ...], float] | None = None
    for share in SHARES:
        sizes = tuple(
            _climb(item, floor, rungs, seconds, share * whole) for item, floor in enumerate(floors)
        )
        schedule = Schedule(order, _queues(sizes, seconds), sizes, ())
        end = max(finish_times(schedule, seconds))
        if best is None or end < best[0] * 0.99:
            best = end, sizes, share
        if best[0] * 0.99 <= whole:
            break
    assert best is not None
    return best[1], _reasons(problems, floors, best[1], best[2])


def _floor(problem: AnyProblem, rungs: Sequence[int], costs: Costs, measure: Measure) -> int:
    """Find the smallest group whose ranks can hold the item."""
    for size in rungs:
        if not costs.memory or measure.memory(problem, size, costs) <= costs.memory:
            return size
    enough = enough_ranks(
        lambda ranks: measure.memory(problem, ranks, costs), problem.tokens, costs.memory
    )
    raise RejectedError(
        f"an item of {problem} needs {measure.memory(problem, rungs[-1], costs) >> 20} MiB on each "
        f"of {rungs[-1]} ranks, which hold {costs.memory >> 20} MiB",
        fix=f"start at least {enough} ranks"
        if enough
        else "no number of ranks is enough: use devices with more memory",
    )


def _climb(item: int, floor: int, rungs: Sequence[int], seconds: Time, limit: float) -> int:
    """From `floor` up to the first size that keeps to `limit`, while more ranks still help."""
    sizes = [size for size in rungs if size >= floor]
    for size, larger in pairwise(sizes):
        if seconds(item, size) <= limit or seconds(item, larger) > 0.8 * seconds(item, size):
            return size
    return sizes[-1]


def _reasons(
    problems: Sequence[AnyProblem], floors: Sequence[int], sizes: Sequence[int], share: float
) -> tuple[str, ...]:
    """One line for each group size: how many items, how long, and why that many ranks."""
    lines = []
    for size in sorted(set(sizes), reverse=True):
        those = [item for item, own in enumerate(sizes) if own == size]
        tokens = [problems[item].tokens for item in those]
        if size == 1:
            why = "none is worth sharing"
        elif all(floors[item] == size for item in those):
            why = "fewer ranks can't hold one"
        elif share:
            why = f"fewer ranks would need over {share:.2g} of the whole job's time for one"
        else:
            why = "there are more ranks than items to keep them busy"
        lines.append(
            f"{counted(len(those), 'item')} of {_range(tokens)} tokens on "
            f"{counted(size, 'rank')} each: {why}"
        )
    return tuple(lines)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}…{high}"


def finish_times(schedule: Schedule, seconds: Time) -> list[float]:
    """Simulate `schedule`: when each rank (in `order`) has done its last item."""
    from heapq import heappop, heappush  # a job that runs simulates nothing

    turns = [0] * len(schedule.queues)

    def claim(queue: int) -> int:
        turns[queue] += 1
        return turns[queue] - 1

    world = len(schedule.order)
    ends = [0.0] * world
    # When it claims next, its run of ranks, its queue and its items of that, and the ends of the
    # last ones that it claimed.
    nothing: tuple[int, ...] = ()
    begun: tuple[float, ...] = (0.0,)
    groups = [(0.0, 0, world, -1, iter(nothing), begun)]
    while groups:
        _, start, stop, queue, items, claimed = heappop(groups)
        item = next(items, None)
        if item is not None:
            claimed = (*claimed, claimed[-1] + seconds(item, stop - start))[-AHEAD - 1 :]
            heappush(groups, (claimed[0], start, stop, queue, items, claimed))
            continue
        ends[start:stop] = [claimed[-1]] * (stop - start)
        queue += 1
        if queue < len(schedule.queues):
            size, free = schedule.queues[queue].size, claimed[-1]
            for low in range(start, stop, size):
                high = min(low + size, stop)
                fits = high - low == size
                items = schedule.items(queue, low // size, claim) if fits else iter(nothing)
                heappush(groups, (free, low, high, queue, items, (free,)))
    return ends
