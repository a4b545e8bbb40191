"""The networks compute attention: executed layer by layer, on all ranks, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, StrategyName
from mdattn_mpi.trt.versions import Form
from tests.support.attention_network import UNIT, AttentionNetwork

STRATEGIES: tuple[StrategyName, ...] = ("ring", "allgather", "ulysses")


def check(
    problem: AttentionProblem,
    strategy: StrategyName,
    ranks: int,
    others: tuple[AttentionProblem, ...] = (),
    seed: int = 0,
    form: Form | None = None,
) -> None:
    """Execute the network for `problem` (and `others`, by one profile); compare `problem`."""
    network = AttentionNetwork(problem, strategy, ranks, others, seed, form)
    output, expected = network.run(network.interpret), network.expected
    # The query is rounded once more, after scaling: that moves scores by up to u·|score|.
    assert np.abs(output - expected).max() < 8 * UNIT[problem.dtype]
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
