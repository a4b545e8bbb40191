"""Scheduling items on groups: complete, nested, balanced, and the same whoever is faster."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.costs import Costs, typical_costs
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.estimate import item_seconds, least_memory
from mdattn_mpi.planning.schedule import (
    Measure,
    Queue,
    Schedule,
    expected_seconds,
    finish_times,
    ladder,
    make_schedule,
)
from mdattn_mpi.problem import AttentionProblem

GPU = typical_costs("cuda")


def problem(tokens: int, heads: int = 8) -> AttentionProblem:
    return AttentionProblem(tokens, tokens, heads, heads, 128, 128)


def long_tailed(count: int, sigma: float, seed: int) -> list[AttentionProblem]:
    draw = random.Random(seed)
    return [
        problem(min(1 << 20, max(1024, int(draw.lognormvariate(9.7, sigma))))) for _ in range(count)
    ]


def cluster(ranks: int, per_node: int = 8) -> list[str]:
    return [f"n{rank // per_node}" for rank in range(ranks)]


def lateness(
    schedule: Schedule, problems: list[AttentionProblem], noise: float, seed: int
) -> float:
    """End of the last rank against the mean over ranks."""
    draw = random.Random(seed)
    luck = [draw.uniform(1 - noise, 1 + noise) for _ in problems]
    expected = expected_seconds(problems, len(schedule.order), GPU)
    ends = finish_times(schedule, lambda item, size: luck[item] * expected(item, size))
    return max(ends) / (sum(ends) / len(ends))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("size", [1, 4])
def test_groups_of_one_size_end_together(groups: int, size: int) -> None:
    for seed in range(3):
        problems = long_tailed(1000, 0.5, seed)
        schedule = make_schedule(problems, cluster(groups * size), size, GPU)
        expected = expected_seconds(problems, groups * size, GPU)
        seconds = [expected(item, size) for item in range(1000)]
        fair = sum(seconds) / groups
        assert max(seconds) < fair, "this draw could not be balanced by anybody"
        # Where even the shortest item is longer than 3 % of a share, as far apart as that one is.
        assert lateness(schedule, problems, 0.1, seed) <= 1 + max(0.03, min(seconds) / fair)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.3])
def test_auto_ends_together_however_long_the_tail(ranks: int, sigma: float) -> None:
    for seed in range(3):
        problems = long_tailed(1000, sigma, seed)
        schedule = make_schedule(problems, cluster(ranks), "auto", GPU)
        assert lateness(schedule, problems, 0.1, seed) <= 1.03


def test_auto_gives_long_items_many_ranks_and_short_ones_few() -> None:
    problems = [problem(1 << 20), *(problem(4096) for _ in range(500))]
    schedule = make_schedule(problems, cluster(16), "auto", GPU)
    assert schedule.sizes[0] == 16
    assert set(schedule.sizes[1:]) == {1}
    assert len(schedule.reasons) == 2
    assert "1048576" in schedule.reasons[0]
    assert "500 items" in schedule.reasons[1]


def test_auto_beats_every_fixed_size_on_mixed_lengths() -> None:
    problems = long_tailed(1000, 1.3, 7)

    def end(group_size: int | str) -> float:
        schedule = make_schedule(problems, cluster(32), group_size, GPU)
        return max(finish_times(schedule, expected_seconds(problems, 32, GPU)))

    assert end("auto") <= 1.01 * min(end(size) for size in (1, 2, 4, 8, 16, 32))


def test_one_item_takes_the_world() -> None:
    assert make_schedule([problem(1 << 20)], cluster(12, 4), "auto", GPU).sizes == (12,)


def test_memory_sets_the_smallest_group() -> None:
    problems = [problem(65536)] * 400
    assert set(make_schedule(problems, cluster(8), "auto", GPU).sizes) == {1}
    enough = least_memory(problems[0], 4, GPU)
    tight = make_schedule(problems, cluster(8), "auto", replace(GPU, memory=enough))
    assert set(tight.sizes) == {4}
    assert "can't hold" in tight.reasons[0]
    little = replace(GPU, memory=least_memory(problems[0], 48, GPU))
    with pytest.raises(RejectedError, match="start at least 48 ranks"):
        make_schedule(problems, cluster(8), "auto", little)
    with pytest.raises(RejectedError, match="devices with more memory"):
        make_schedule(problems, cluster(8), "auto", replace(GPU, memory=1000))


def test_what_the_first_item_of_a_shape_takes_counts_once_a_group() -> None:
    alike = [problem(131072)] * 8
    unlike = [problem(131072 + 128 * item) for item in range(8)]

    def sizes(preparing: float) -> set[int]:
        return set(
            make_schedule(unlike, cluster(16), "auto", replace(GPU, preparing=preparing)).sizes
        )

    # More ranks divide everything but the plans, of which each rank makes its own.
    assert sizes(0.0) == {16}
    assert sizes(10.0) == {1}
    planned = []
    for problems in (alike, unlike):
        prepared, without = (
            expected_seconds(problems, 16, replace(GPU, preparing=preparing))
            for preparing in (10.0, 0.0)
        )
        for size in (1, 16):
            planned.append(
                sum(prepared(item, size) - without(item, size) for item in range(8)) / 10
            )
    # One group of all ranks plans one shape once; sixteen groups never more often than items.
    assert planned == pytest.approx([8, 1, 8, 8])


def test_sizes_do_not_follow_what_is_left() -> None:
    problems = long_tailed(200, 1.3, 3)
    whole = make_schedule(problems, cluster(16), "auto", GPU)
    rest = whole.only(range(50, 60))
    assert rest.sizes == whole.sizes
    assert rest.signature == whole.signature
    assert len(rest.queues) == len(whole.queues)
    assert sorted(item for queue in rest.queues for item in queue.items) == list(range(50, 60))


@given(
    nodes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    tokens=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=40),
    share=st.booleans(),
)
def test_every_item_is_done_once_by_ranks_that_nest(
    nodes: list[int], tokens: list[int], share: bool
) -> None:
    names = [f"n{node}" for node, ranks in enumerate(nodes) for _ in range(ranks)]
    random.Random(0).shuffle(names)
    problems = [problem(one, 1) for one in tokens]
    schedule = make_schedule(problems, names, "auto" if share else len(names), GPU)
    assert sorted(item for queue in schedule.queues for item in queue.items) == list(
        range(len(tokens))
    )
    assert sorted(schedule.order) == list(range(len(names)))
    above: set[tuple[int, ...]] = {schedule.order}
    for queue in schedule.queues:
        groups = {schedule.group(queue.size, rank) for rank in range(len(names))} - {None}
        assert groups
        for group in groups:
            assert group is not None
            assert len(group) == queue.size
            assert any(not set(group) & set(wider) or set(group) <= set(wider) for wider in above)
        above = {group for group in groups if group}
    done: list[int] = []

    def seconds(item: int, size: int) -> float:
        done.append(item)
        assert size == schedule.sizes[item]
        return 1.0

    finish_times(schedule, seconds)
    assert sorted(done) == list(range(len(tokens)))


def test_a_node_keeps_its_ranks_together() -> None:
    names = ["b", "a"] * 4  # dealt out cyclically by the launcher
    schedule = make_schedule([problem(8192)] * 9, names, 4, GPU)
    assert schedule.group(4, 0) == (0, 2, 4, 6)
    assert schedule.group(4, 3) == (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("nodes", "sizes"),
    [
        ([8, 8], (1, 2, 4, 8, 16)),
        ([4, 4, 4], (1, 2, 4, 8, 12)),
        ([6], (1, 3, 6)),
        ([4, 4, 2], (1, 2, 4, 8, 10)),
        ([7, 5], (1, 2, 4, 8, 12)),
        ([1], (1,)),
    ],
)
def test_ladder(nodes: list[int], sizes: tuple[int, ...]) -> None:
    assert ladder([f"n{i}" for i, ranks in enumerate(nodes) for _ in range(ranks)]) == sizes


@pytest.mark.parametrize("size", [0, 3, 5, 9])
def test_groups_that_do_not_divide_the_world_are_refused(size: int) -> None:
    with pytest.raises(RejectedError, match="1, 2, 4, 8 or auto"):
        make_schedule([problem(8192)], cluster(8), size, GPU)


@pytest.mark.parametrize(("ranks", "group_size"), [(1024, 1), (4096, 4), (1024, "auto")])
def test_a_thousand_groups_share_a_hundred_thousand_items(
    ranks: int, group_size: int | str
) -> None:
    """Against what nobody can beat: the work shared evenly, and the longest item."""
    draw, smallest = random.Random(4), 1 if group_size == "auto" else int(group_size)
    each = {tokens: problem(tokens) for tokens in range(1024, (1 << 19) + 1, 1024)}
    lengths = (draw.lognormvariate(9.7, 1.0) for _ in range(100_000))
    problems = [each[min(1 << 19, max(1024, int(length) & -1024))] for length in lengths]
    luck = [draw.uniform(0.9, 1.1) for _ in problems]
    expected = expected_seconds(problems, ranks, GPU)

    def seconds(item: int, size: int) -> float:
        return luck[item] * expected(item, size)

    schedule = make_schedule(problems, cluster(ranks), group_size, GPU)
    work = sum(seconds(item, smallest) for item in range(len(problems))) * smallest
    longest = max(seconds(item, size) for item, size in enumerate(schedule.sizes))
    bound = max(longest, work / ranks)
    assert max(finish_times(schedule, seconds)) <= 1.01 * bound
    backwards = tuple(Queue(queue.size, queue.items[::-1]) for queue in schedule.queues)
    assert max(finish_times(replace(schedule, queues=backwards), seconds)) > 1.01 * bound


@pytest.mark.parametrize("ranks", [12, 13])
def test_every_group_begins_with_one_of_the_longest(ranks: int) -> None:
    """Whoever claims first, and however far ahead; in a resumed job, whose first queue is done."""
    queues = Queue(8, ()), Queue(4, tuple(range(40))), Queue(1, tuple(range(40, 60)))
    schedule = Schedule(tuple(range(ranks)), queues, (4,) * 40 + (1,) * 20, ())
    turns = itertools.count()

    def take(queue: int, group: int) -> list[int]:
        items = schedule.items(queue, group, lambda _: next(turns))
        return list(itertools.islice(items, 3))

    assert [take(1, group) for group in range(3)] == [[0, 3, 4], [1, 5, 6], [2, 7, 8]]
    turns = itertools.count()
    assert [take(2, group) for group in (9, 0)] == [[40, 41, 42], [43, 44, 45]]


def test_the_work_of_scheduling_an_item_does_not_grow_with_the_job() -> None:
    asked = 0

    def counting(problem: AttentionProblem, ranks: int, costs: Costs) -> float:
        nonlocal asked
        asked += 1
        return item_seconds(problem, ranks, costs)

    def estimates(count: int, ranks: int) -> float:
        nonlocal asked
        asked = 0
        measure = Measure(counting, least_memory)
        make_schedule(long_tailed(count, 1.3, 1), cluster(ranks), "auto", GPU, measure)
        return asked / count

    assert estimates(1000, 64) < 1.5 * estimates(100, 64) < 15
    # With many items a rank the first share that is tried will do.
    assert estimates(20_000, 64) < 1.5
