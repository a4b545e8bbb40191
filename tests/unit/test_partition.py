"""Who owns which tokens and heads: every one exactly once, evenly, and blocks equal the mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import FULL, LOWER_RIGHT, MAX_RUNS, Mask, seen_pairs
from mdattn_mpi.partition import (
    blocks,
    busiest_share,
    equal_shards,
    even_shares,
    head_shards,
    partition,
    partition_of,
    pieces,
    seen,
    split,
    token_count,
    zigzag,
)
from mdattn_mpi.problem import AttentionProblem, Causal, Partition, Plan, Span, StrategyName
from tests.support.reference import problems

ranks = st.integers(1, 20)
spans = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: Span(*sorted(pair)))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Masks over some 30 tokens."""
    low, high = sorted((draw(st.integers(-35, 35)), draw(st.integers(-35, 35))))
    cuts = sorted(draw(st.sets(st.integers(1, 29))))
    documents = tuple(map(Span, [0, *cuts], [*cuts, 30]))
    return Mask(
        draw(st.sampled_from([None, low])),
        draw(st.sampled_from([None, high])),
        documents if draw(st.booleans()) else (),
    )


def visible(query: Sequence[Span], kv: Sequence[Span], mask: Mask) -> NDArray[np.bool_]:
    """Who sees whom, from the definition."""
    i, j = (np.array(tokens_of(shard), int) for shard in (query, kv))
    after = j[None, :] - i[:, None]
    found = np.full(after.shape, True)
    if mask.low is not None:
        found &= after >= mask.low
    if mask.high is not None:
        found &= after <= mask.high
    for document in mask.documents:
        found &= (i[:, None] < document.start) == (j[None, :] < document.start)
    return found


def tokens_of(shard: Sequence[Span]) -> list[int]:
    return [token for span in shard for token in range(span.start, span.stop)]


@given(length=st.integers(0, 10**6), parts=st.integers(1, 2000))
def test_split_covers_everything_evenly_longer_first(length: int, parts: int) -> None:
    runs = split(length, parts)
    assert len(runs) == parts
    assert (runs[0].start, runs[-1].stop) == (0, length)
    assert all(a.stop == b.start for a, b in pairwise(runs))
    sizes = [len(run) for run in runs]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(problem=problems(max_tokens=200), strategy=st.sampled_from(get_args(StrategyName)), p=ranks)
def test_every_token_has_one_owner(
    problem: AttentionProblem, strategy: StrategyName, p: int
) -> None:
    owners = partition(problem, strategy, p)
    for shards, tokens in ((owners.query, problem.q_tokens), (owners.kv, problem.kv_tokens)):
        assert len(shards) == p
        assert sorted(token for shard in shards for token in tokens_of(shard)) == list(
            range(tokens)
        )
        sizes = [token_count(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1


@given(problem=problems(), p=ranks)
def test_gathered_keys_stay_in_order_and_ulysses_is_contiguous(
    problem: AttentionProblem, p: int
) -> None:
    gathered = [span for shard in partition(problem, "allgather", p).kv for span in shard]
    if not problem.mask.hides_keys:
        assert gathered == list(split(problem.kv_tokens, p))
    assert all(len(shard) == 1 for shard in partition(problem, "ulysses", p).query)


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
@pytest.mark.parametrize("p", [2, 3, 8, 64])
def test_causal_work_is_balanced(strategy: StrategyName, p: int) -> None:
    problem = AttentionProblem(100_003, 100_003, 1, 1, 8, 8, causal="upper_left")
    work = [
        sum(seen_pairs(len(span), problem.kv_tokens, span.start) for span in shard)
        for shard in partition(problem, strategy, p).query
    ]
    assert sum(work) == problem.pairs
    assert max(work) <= 1.001 * min(work)


def test_contiguous_causal_work_would_not_be() -> None:
    work = [seen_pairs(len(span), 1000, span.start) for span in split(1000, 8)]
    assert max(work) > 10 * min(work)


@pytest.mark.parametrize("p", [2, 3, 4, 7])
def test_every_step_of_a_causal_ring_does_the_same_work(p: int) -> None:
    owners = zigzag(2 * p * 512, p)
    for rank in range(p):
        for step in range(p):
            found = blocks(owners[rank], owners[(rank - step) % p], Mask(high=0))
            assert len(found) == 1
            full = 2 * 512 * 512
            pairs = sum(
                len(b.q) * len(b.kv) - (b.band == LOWER_RIGHT) * len(b.q) ** 2 // 2 for b in found
            )
            assert abs(pairs - full) <= 2 * 512


def test_one_rank_runs_one_call() -> None:
    for mask in (Mask(), Mask(high=0), Mask(low=-7, high=3)):
        (block,) = blocks(zigzag(99, 1)[0], zigzag(99, 1)[0], mask)
        assert (block.q, block.kv) == (Span(0, 99), Span(0, 99))


@given(
    query=st.lists(spans, max_size=4),
    kv=st.lists(spans, max_size=4),
    mask=masks(),
)
def test_blocks_are_the_mask(query: list[Span], kv: list[Span], mask: Mask) -> None:
    wanted = visible(query, kv, mask)
    covered = np.zeros(wanted.shape, int)
    for block in blocks(tuple(query), tuple(kv), mask):
        rows, keys = np.ogrid[: len(block.q), : len(block.kv)]
        after = keys - rows - (len(block.kv) - len(block.q))
        found = np.full(after.shape, True)
        if block.band != FULL:
            assert 1 < len(block.q) <= len(block.kv)
        if block.band.before is not None:
            assert block.band.before >= 0
            found &= after >= -block.band.before
        if block.band.after is not None:
            assert block.band.after >= 0
            found &= after <= block.band.after
        assert found.size
        assert found.any(axis=1).all()
        assert found.any(axis=0).all()
        assert found[-1, -1]
        covered[block.q.slice, block.kv.slice] += found
    assert (covered == wanted).all()


@given(
    query=st.lists(spans, max_size=4),
    kv=st.lists(spans, max_size=4),
    mask=masks(),
)
def test_seen_are_the_columns_of_the_mask(query: list[Span], kv: list[Span], mask: Mask) -> None:
    runs = seen(tuple(query), tuple(kv), mask)
    assert tokens_of(runs) == list(np.flatnonzero(visible(query, kv, mask).any(axis=0)))
    assert all(a.stop < b.start for a, b in pairwise(runs))


@given(q=spans, kv=spans, mask=masks())
def test_pairs_are_counted_as_the_mask_has_them(q: Span, kv: Span, mask: Mask) -> None:
    assert mask.pairs(q, kv) == visible([q], [kv], mask).sum()
    assert mask.pairs_before(q.stop, 30) == visible([Span(0, q.stop)], [Span(0, 30)], mask).sum()


@given(shard=st.lists(spans, max_size=6))
def test_pieces_keep_local_order_and_join_what_touches(shard: list[Span]) -> None:
    found = pieces(tuple(shard))
    assert [token for _, run in found for token in tokens_of([run])] == tokens_of(shard)
    assert [row for rows, _ in found for row in tokens_of([rows])] == list(
        range(token_count(shard))
    )
    assert all(len(rows) == len(run) > 0 for rows, run in found)
    assert all(a[1].stop != b[1].start for a, b in pairwise(found))


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 12), p=ranks)
def test_heads_are_dealt_once_with_the_kv_heads_they_read(
    kv_heads: int, group: int, p: int
) -> None:
    shards = head_shards(kv_heads * group, kv_heads, p)
    assert len(shards) == p
    assert [n for s in shards for n in range(s.q.start, s.q.stop)] == list(range(kv_heads * group))
    for shard in shards:
        read = [n // group for n in range(shard.q.start, shard.q.stop)]
        assert sorted(set(read)) == list(range(shard.kv.start, shard.kv.stop))
        if read:  # a kernel divides: local query head n reads local kv head n // (Nq / Nkv)
            local = len(shard.q) // len(shard.kv)
            assert [shard.kv.start + n // local for n in range(len(shard.q))] == read


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 12), p=ranks)
def test_heads_are_dealt_evenly_where_they_divide(kv_heads: int, group: int, p: int) -> None:
    sizes = [len(shard.q) for shard in head_shards(kv_heads * group, kv_heads, p)]
    if kv_heads % p == 0 or (p % kv_heads == 0 and group % (p // kv_heads) == 0):
        assert len(set(sizes)) == 1
    assert max(sizes) <= -(-kv_heads // p) * group


def test_a_plan_may_bring_its_own_partition() -> None:
    problem = AttentionProblem(4, 4, 1, 1, 8, 8)
    own = Partition(((Span(1, 4),), (Span(0, 1),)), ((Span(0, 4),), ()))
    assert partition_of(Plan(problem, "ring", 2, partition=own)) is own
    assert partition_of(Plan(problem, "ring", 2)) == partition(problem, "ring", 2)
    assert Plan(problem, "ring", 2, partition=own).digest != Plan(problem, "ring", 2).digest


@st.composite
def masked(draw: st.DrawFn) -> tuple[AttentionProblem, int]:
    """Windows, and documents of long-tailed lengths, with at least 4,096 tokens a rank."""
    p = draw(st.sampled_from([2, 3, 4, 5, 8, 16]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = int(random.integers(4096 * p, 20_000 * p))
    causal: Causal = draw(st.sampled_from(["none", "upper_left"]))
    window, segments = (-1, -1), (0,)
    if draw(st.booleans()):
        before = draw(st.sampled_from([0, 127, 4095, tokens // 10, tokens // 2]))
        window = (before, 0 if causal != "none" else draw(st.sampled_from([-1, 0, before])))
    if draw(st.booleans()):
        lengths = 1 + 100 * random.pareto(random.uniform(0.6, 2), 4000)
        starts = np.cumsum(lengths).astype(int)
        segments = (0, *map(int, np.unique(starts[(starts > 0) & (starts < tokens)])))
    return AttentionProblem(tokens, tokens, 1, 1, 8, 8, causal=causal, window=window,
                            segments=segments), p  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(masked())
def test_work_under_any_mask_is_balanced(case: tuple[AttentionProblem, int]) -> None:
    problem, p = case
    for strategy in ("ring", "allgather"):
        owners = partition(problem, strategy, p)  # type: ignore[arg-type]
        mask = problem.mask
        work = [
            sum(mask.pairs(span, Span(0, problem.kv_tokens)) for span in shard)
            for shard in owners.query
        ]
        assert sum(work) == problem.pairs
        assert max(work) * p <= 1.03 * problem.pairs
        sizes = [token_count(shard) for shard in owners.query]
        assert max(sizes) - min(sizes) <= 1
        assert max(map(len, owners.query)) <= MAX_RUNS


def test_even_shares_of_a_causal_mask_are_two_runs_each() -> None:
    """The arc with a rank's share of pairs is a run in the middle; then what is around it."""
    problem = AttentionProblem(8 * 1024, 8 * 1024, 1, 1, 8, 8, causal="upper_left")
    assert busiest_share(problem, even_shares(problem, 4)) < 0.2501
    assert max(map(len, even_shares(problem, 4))) == 2


def test_no_ranks_is_refused() -> None:
    with pytest.raises(RejectedError, match="0 ranks"):
        partition(AttentionProblem(4, 4, 1, 1, 8, 8), "ring", 0)


@given(tokens=st.integers(1, 500), p=ranks)
def test_shards_of_a_zigzag_don_t_overlap(tokens: int, p: int) -> None:
    for a, b in combinations(zigzag(tokens, p), 2):
        assert not set(tokens_of(a)) & set(tokens_of(b))


@given(tokens=st.integers(0, 10**6), p=ranks)
def test_equal_shards_cover_everything_and_only_the_last_are_shorter(tokens: int, p: int) -> None:
    runs = equal_shards(tokens, p)
    assert len(runs) == p
    assert (runs[0].start, runs[-1].stop) == (0, tokens)
    assert all(a.stop == b.start for a, b in pairwise(runs))
    length = len(runs[0])
    assert length == -(-tokens // p)
    assert all(run.start == min(rank * length, tokens) for rank, run in enumerate(runs))
