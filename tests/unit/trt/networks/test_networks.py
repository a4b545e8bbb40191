"""The networks compute attention: executed layer by layer, on all ranks, against float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.partition import equal_partition
from mdattn_mpi.problem import AttentionProblem, StrategyName
from mdattn_mpi.trt.versions import Form
from tests.support.network_interpreter import ThreadRanks, interpret, padded, recorded, shards
from tests.support.tensorrt import library

STRATEGIES: tuple[StrategyName, ...] = ("ring", "allgather", "ulysses")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def attend(problem: AttentionProblem, q: Any, k: Any, v: Any) -> Any:
    """Attention in float64, written once more: whole sequences, one head at a time."""
    out = np.zeros((problem.q_tokens, problem.q_heads, problem.v_head_dim))
    for head in range(problem.q_heads):
        kv = head // problem.group_heads
        scores = problem.scale * q[:, head].astype(float) @ k[:, kv].astype(float).T
        if problem.diagonal is not None:
            i, j = np.ogrid[: problem.q_tokens, : problem.kv_tokens]
            scores[j > i + problem.diagonal] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv].astype(float)
    return out


def draw(problem: AttentionProblem, seed: int) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    dtype = DTYPES[problem.dtype]

    def tokens(count: int, heads: int) -> Any:
        return random.standard_normal((count, heads, problem.head_dim)).astype(dtype)

    return (
        tokens(problem.q_tokens, problem.q_heads),
        tokens(problem.kv_tokens, problem.kv_heads),
        tokens(problem.kv_tokens, problem.kv_heads),
    )


def check(
    problem: AttentionProblem,
    strategy: StrategyName,
    ranks: int,
    others: tuple[AttentionProblem, ...] = (),
    seed: int = 0,
    form: Form | None = None,
) -> None:
    """Execute the network for `problem` (and `others`, by one profile); compare `problem`."""
    from mdattn_mpi.trt.choice import spec_for
    from mdattn_mpi.trt.networks import NETWORKS, define

    found = library()
    (own,) = spec_for((problem,), strategy, ranks)
    specs = spec_for((problem, *others), strategy, ranks)
    (spec,) = [each for each in specs if each.includes(own)]
    builder = found.api.Builder(found.api.Logger(found.api.Logger.ERROR))
    with recorded(found.api) as collectives:
        network = define(found, builder, spec, form)
    assert Counter(collectives.values()) == spec.collectives  # what the inspector must find
    q, k, v = draw(problem, seed)
    parts = equal_partition(problem, ranks)

    def one(group: ThreadRanks) -> Any:
        shapes = NETWORKS[strategy].shapes(problem, ranks, group.rank)
        own = shards(q, parts.query, group.rank)
        inputs = {
            "query": padded(own, shapes.q),
            "key": padded(shards(k, parts.kv, group.rank), shapes.kv),
            "value": padded(shards(v, parts.kv, group.rank), shapes.kv),
            "keys": np.array([shapes.keys], np.int64),
        }
        output = interpret(found.api, network, inputs, group, collectives)["output"]
        assert output.shape == (shapes.q, problem.q_heads, problem.head_dim)
        return output[: len(own)]

    output = np.concatenate(ThreadRanks.run(ranks, one)).astype(np.float64)
    expected = attend(problem, q, k, v)
    # The query is rounded once more, after scaling: that moves scores by up to u·|score|.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[problem.dtype]
    assert np.abs(output - expected).max() < 8 * unit
    if expected.size > 1000:  # of few numbers, all may happen to be small
        assert np.abs(expected).max() > 0.3  # zeros would have failed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_attention(strategy: StrategyName, ranks: int, dtype: Any) -> None:
    check(AttentionProblem(64, 64, 16, 4, 32, 32, dtype), strategy, ranks)


@pytest.mark.parametrize("form", [Form(border=True), Form(wide=True), Form(True, True)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_way_round(strategy: StrategyName, form: Form) -> None:
    causal: Any = "none" if strategy == "ring" else "upper_left"
    check(AttentionProblem(64, 64, 8, 4, 32, 32, "float16", causal), strategy, 2, form=form)


@pytest.mark.parametrize("causal", ["upper_left", "lower_right"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
def test_causal_with_a_profile(strategy: StrategyName, ranks: int, causal: Any) -> None:
    problem = AttentionProblem(61, 61, 8, 2, 16, 16, "float16", causal)
    longer = AttentionProblem(100, 100, 8, 2, 16, 16, "float16", causal)
    check(problem, strategy, ranks, (longer,))
    check(longer, strategy, ranks, (problem,))


@st.composite
def cases(draw: st.DrawFn) -> tuple[AttentionProblem, StrategyName, int]:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    kv_heads = draw(st.integers(1, 4))
    problem = AttentionProblem(
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        kv_heads * draw(st.integers(1, 4)),
        kv_heads,
        dim := draw(st.sampled_from([4, 8, 24])),
        dim,
        draw(st.sampled_from(["bfloat16", "float16"])),
        draw(st.sampled_from(["none", "upper_left", "lower_right"])),
        draw(st.sampled_from([None, 0.5, 1.0])),
    )
    return problem, draw(st.sampled_from(STRATEGIES)), ranks


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), longer=st.integers(0, 9))
def test_any_problem_is_right_or_refused(
    case: tuple[AttentionProblem, StrategyName, int], seed: int, longer: int
) -> None:
    from dataclasses import replace

    problem, strategy, ranks = case
    other = replace(problem, kv_tokens=problem.kv_tokens + longer)
    try:
        check(problem, strategy, ranks, (other,) if longer else (), seed=seed)
    except RejectedError as refused:
        event("refused")
        assert_says_what_works(refused)


def assert_says_what_works(refused: RejectedError) -> None:
    assert refused.fix.startswith("use -"), refused.fix
