"""The proof of an engine: right passes; zeros, a rank's own attention, and other lies don't."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.trt.choice import spec_for
from mdattn_mpi.trt.library import Library
from mdattn_mpi.trt.proof import (
    DTYPES,
    FAR,
    TOKENS,
    KnownItem,
    Verdict,
    conclude,
    judge,
    shortest_problem,
)
from mdattn_mpi.trt.spec import EngineSpec, Extent, any_length

SHA = "3f" * 32
FULL = Library("tensorrt", "11.0.0.114", SimpleNamespace())


def attend(problem: AttentionProblem, q: Any, k: Any, v: Any, first: int = 0) -> Any:
    """Attention in float64, once more: the query's rows begin at `first`."""
    k, v = (np.repeat(x.astype(float), problem.group_heads, axis=1) for x in (k, v))
    scores = problem.scale * np.einsum("qnh,knh->nqk", q.astype(float), k)
    if problem.diagonal is not None:
        rows = first + np.arange(len(q))[:, None] + problem.diagonal
        scores[:, np.arange(len(k)) > rows] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("nqk,knh->qnh", weights / weights.sum(axis=2, keepdims=True), v)


def known(causal: Any = "none", dtype: Any = "bfloat16", ranks: int = 3, **more: Any) -> KnownItem:
    problem = AttentionProblem(100, 100, 6, 3, 32, 32, dtype, causal, **more)
    (spec,) = spec_for([problem], "allgather", ranks)
    return KnownItem.of(spec, range(5, 5 + ranks), SHA)


def right(item: KnownItem, rank: int) -> Any:
    (span,) = item.partition.query[rank]
    found = attend(item.problem, item.shards(rank)[0], *item.keys_and_values, span.start)
    return found.astype(DTYPES[item.problem.dtype])


@pytest.mark.parametrize("causal", ["none", "upper_left"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [None, 0.001, 3.0])
def test_right_passes_and_the_controls_are_far(causal: Any, dtype: Any, scale: Any) -> None:
    item = known(causal, dtype, scale=scale)
    for rank in range(3):
        verdict = judge(item, rank, right(item, rank))
        assert verdict.error <= 1
        assert verdict.seen == ""
        assert verdict.zeros > FAR
        if causal != "none" and rank == 0:
            assert verdict.control is None  # rank 0 sees nobody else's keys
        else:
            assert verdict.control is not None
            assert verdict.control > FAR


@pytest.mark.parametrize("causal", ["none", "upper_left"])
def test_what_is_wrong_is_wrong_and_has_a_name(causal: Any) -> None:
    item, rank = known(causal), 1
    truth = right(item, rank)
    query, *own = item.shards(rank)
    one_head_off = np.roll(truth, 1, axis=1)
    lies = {
        "zeros": np.zeros_like(truth),
        "NaN in every row": np.full_like(truth, np.nan),
        "aren't finite": np.where(truth > 2, np.inf, truth),
        "belong to no rank": one_head_off,
        "too large an error": truth + 0.02 * np.sign(truth),
    }
    if causal == "none":
        lies["its own keys only"] = attend(item.problem, query, *own)
        lies["keys of rank 7 only"] = attend(item.problem, query, *item.shards(2)[1:])
        lies["the output of rank 5"] = right(item, 0)[: len(truth)]
        lies["another group's ranks, 0 to 2"] = attend(
            item.problem, query, *replace(item, world_ranks=(0, 1, 2)).keys_and_values
        )
    else:
        lies["belong to no rank"] = attend(
            replace(item.problem, causal="none"), query, *item.keys_and_values
        )
    for name, output in lies.items():
        if name.startswith("the output of") and len(output) != len(truth):
            continue
        verdict = judge(item, rank, output.astype(DTYPES[item.problem.dtype]))
        assert verdict.error > 1, name
        assert name in verdict.seen


def test_every_engine_and_every_rank_has_other_numbers() -> None:
    item = known()
    again = replace(item, seed=item.seed + 1)
    shards = [*(item.shards(rank) for rank in range(3)), *(again.shards(rank) for rank in range(3))]
    firsts = [[array[:4].tobytes() for array in shard] for shard in shards]
    assert len({one for shard in firsts for one in shard}) == 18


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3),
    st.integers(1, 8),
    st.sampled_from(["ring", "allgather", "ulysses"]),
    st.sampled_from(["none", "upper_left", "lower_right"]),
    st.booleans(),
)
def test_the_shortest_problem_is_one_that_the_engine_takes(
    lengths: list[tuple[int, int]], ranks: int, strategy: Any, causal: Any, ranged: bool
) -> None:
    problems = [AttentionProblem(q, kv, 8, 8, 8, 8, "bfloat16", causal) for q, kv in lengths]
    try:
        specs = spec_for(problems, strategy, ranks)
    except RejectedError:
        return
    for spec in specs:
        wide = any_length(spec) if ranged else spec
        found = shortest_problem(wide)
        (needed,) = spec_for([found], strategy, ranks)
        assert wide.includes(needed)
        if wide.q.min <= TOKENS <= wide.q.max and wide == any_length(spec):
            assert found.q_tokens <= TOKENS * ranks


def test_an_engine_that_nothing_fits_is_refused() -> None:
    (spec,) = spec_for([AttentionProblem(64, 64, 8, 8, 8, 8, "bfloat16", "none")], "allgather", 2)
    with pytest.raises(RejectedError, match="no attention fits"):
        shortest_problem(replace(spec, keys=Extent(65, 65, 65)))


SPEC = EngineSpec(
    "allgather", 2, 8, 2, 64, "bfloat16", "none", 0.125,
    Extent(9, 9, 9), Extent(9, 9, 9), Extent(18, 18, 18),
)  # fmt: skip
GOOD = Verdict(0.7, 100.0, 100.0)


def test_the_conclusion() -> None:
    conclude(SPEC, FULL, (4, 5), (GOOD, GOOD))
    with pytest.raises(DeviceError, match="rank 5 gives zeros") as caught:
        conclude(SPEC, FULL, (4, 5), (GOOD, Verdict(7.0, 100.0, 7.0, "zeros")))
    assert "tensorrt 11.0.0.114 computes wrong attention by allgather on 2 ranks" in str(caught)
    assert "single-device engine" in caught.value.what
    assert "-s ulysses" in caught.value.fix
    for useless in (Verdict(0.7, 2.0, 100.0), Verdict(0.7, 100.0, 2.0), Verdict(0.7, None, 100.0)):
        with pytest.raises(DeviceError, match="can't be proven"):
            conclude(SPEC, FULL, (4, 5), (useless, useless))
    conclude(replace(SPEC, ranks=1), FULL, (4,), (Verdict(0.7, None, 100.0),))
