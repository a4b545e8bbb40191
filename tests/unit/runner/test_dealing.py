"""Dealing items to groups: complete, nested, balanced, and the same whoever is faster."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.runner.dealing import RATES, Rates, Schedule, deal, ladder, simulate

GPU = RATES["cuda"]


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
    ends = simulate(schedule, lambda item, size: luck[item] * GPU.seconds(problems[item], size))
    return max(ends) / (sum(ends) / len(ends))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("size", [1, 4])
def test_groups_of_one_size_end_together(groups: int, size: int) -> None:
    for seed in range(3):
        problems = long_tailed(1000, 0.5, seed)
        schedule = deal(problems, cluster(groups * size), size, rates=GPU)
        longest = max(GPU.seconds(one, size) for one in problems)
        fair = sum(GPU.seconds(one, size) for one in problems) / groups
        assert longest < fair, "this draw could not be balanced by anybody"
        assert lateness(schedule, problems, 0.1, seed) <= 1.03


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.3])
def test_auto_ends_together_however_long_the_tail(ranks: int, sigma: float) -> None:
    for seed in range(3):
        problems = long_tailed(1000, sigma, seed)
        schedule = deal(problems, cluster(ranks), "auto", rates=GPU)
        assert lateness(schedule, problems, 0.1, seed) <= 1.03


def test_auto_gives_long_items_many_ranks_and_short_ones_few() -> None:
    problems = [problem(1 << 20), *(problem(4096) for _ in range(500))]
    schedule = deal(problems, cluster(16), "auto", rates=GPU)
    assert schedule.sizes[0] == 16
    assert set(schedule.sizes[1:]) == {1}
    assert len(schedule.reasons) == 2
    assert "1048576" in schedule.reasons[0]
    assert "500 items" in schedule.reasons[1]


def test_auto_beats_every_fixed_size_on_mixed_lengths() -> None:
    problems = long_tailed(1000, 1.3, 7)

    def end(group_size: int | str) -> float:
        schedule = deal(problems, cluster(32), group_size, rates=GPU)
        return max(simulate(schedule, lambda item, size: GPU.seconds(problems[item], size)))

    assert end("auto") <= 1.01 * min(end(size) for size in (1, 2, 4, 8, 16, 32))


def test_one_item_takes_the_world() -> None:
    assert deal([problem(1 << 20)], cluster(12, 4), "auto", rates=GPU).sizes == (12,)


def test_memory_sets_the_smallest_group() -> None:
    problems = [problem(65536)] * 400
    assert set(deal(problems, cluster(8), "auto", rates=GPU).sizes) == {1}
    tight = deal(problems, cluster(8), "auto", rates=GPU, rank_bytes=1 << 29)
    assert set(tight.sizes) == {4}
    assert "can't hold" in tight.reasons[0]
    with pytest.raises(RejectedError, match="start at least 48 ranks"):
        deal(problems, cluster(8), "auto", rates=GPU, rank_bytes=1 << 25)


def test_sizes_do_not_follow_what_is_left() -> None:
    problems = long_tailed(200, 1.3, 3)
    whole = deal(problems, cluster(16), "auto", rates=GPU)
    rest = whole.only(range(50, 60))
    assert rest.sizes == whole.sizes
    assert rest.signature == whole.signature
    assert len(rest.phases) == len(whole.phases)
    assert sorted(item for phase in rest.phases for item in phase.items) == list(range(50, 60))


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
    schedule = deal(problems, names, "auto" if share else len(names), rates=GPU)
    assert sorted(item for phase in schedule.phases for item in phase.items) == list(
        range(len(tokens))
    )
    assert sorted(schedule.order) == list(range(len(names)))
    above: set[tuple[int, ...]] = {schedule.order}
    for phase in schedule.phases:
        groups = {schedule.group(phase.size, rank) for rank in range(len(names))} - {None}
        assert groups
        for group in groups:
            assert group is not None
            assert len(group) == phase.size
            assert any(not set(group) & set(wider) or set(group) <= set(wider) for wider in above)
        above = {group for group in groups if group}
    done: list[int] = []

    def seconds(item: int, size: int) -> float:
        done.append(item)
        assert size == schedule.sizes[item]
        return 1.0

    simulate(schedule, seconds)
    assert sorted(done) == list(range(len(tokens)))


def test_a_node_keeps_its_ranks_together() -> None:
    names = ["b", "a"] * 4  # dealt out cyclically by the launcher
    schedule = deal([problem(8192)] * 9, names, 4)
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
        deal([problem(8192)], cluster(8), size)


def test_the_work_of_dealing_an_item_does_not_grow_with_the_job() -> None:
    asked = 0

    class Counting(Rates):
        def seconds(self, problem: AttentionProblem, ranks: int) -> float:
            nonlocal asked
            asked += 1
            return super().seconds(problem, ranks)

    def estimates(count: int) -> float:
        nonlocal asked
        asked = 0
        deal(long_tailed(count, 1.3, 1), cluster(64), "auto", rates=Counting(5e14, 2e9, 2e-4, 5e-5))
        return asked / count

    assert estimates(1000) < 1.5 * estimates(100) < 150
