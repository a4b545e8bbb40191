"""Every strategy computes exact attention, whatever the problem, the group and the partition."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.partition import partition, split
from mdattn_mpi.problem import AttentionProblem, Partition, Plan, Span, StrategyName
from tests.support.group import attend_in_group
from tests.support.reference import assert_close, attention, problems, random_inputs

Array = NDArray[Any]
NAMES = get_args(StrategyName)
seeds = st.integers(0, 2**32 - 1)


def check(plan: Plan, seed: int) -> None:
    inputs = random_inputs(plan.problem, seed)
    out, lse = attend_in_group(plan, *inputs)
    assert_close(plan.problem, out, lse, attention(plan.problem, *inputs))


@pytest.mark.parametrize("strategy", NAMES)
@settings(max_examples=80, deadline=None)
@given(problem=problems(), ranks=st.integers(1, 16), seed=seeds)
def test_any_problem_in_any_group(
    strategy: StrategyName, problem: AttentionProblem, ranks: int, seed: int
) -> None:
    check(Plan(problem, strategy, ranks), seed)


@st.composite
def owners(draw: st.DrawFn, tokens: int, ranks: int) -> tuple[tuple[Span, ...], ...]:
    """Deal any cut of the sequence to the ranks, in any order."""
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=2 * ranks)))
    spans = [Span(a, b) for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
    shards: list[list[Span]] = [[] for _ in range(ranks)]
    for span in draw(st.permutations(spans)):
        shards[draw(st.integers(0, ranks - 1))].append(span)
    return tuple(map(tuple, shards))


@pytest.mark.parametrize("strategy", NAMES)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), problem=problems(max_tokens=40), ranks=st.integers(1, 6), seed=seeds)
def test_any_partition(
    strategy: StrategyName, data: st.DataObject, problem: AttentionProblem, ranks: int, seed: int
) -> None:
    anyhow = Partition(
        query=data.draw(owners(problem.q_tokens, ranks)),
        kv=data.draw(owners(problem.kv_tokens, ranks)),
    )
    check(Plan(problem, strategy, ranks, partition=anyhow), seed)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    problem=problems(),
    nodes=st.integers(1, 5),
    node_size=st.integers(1, 4),
    seed=seeds,
)
def test_a_ring_of_nodes_of_any_size(
    data: st.DataObject, problem: AttentionProblem, nodes: int, node_size: int, seed: int
) -> None:
    ranks = nodes * node_size
    anyhow = Partition(
        query=data.draw(owners(problem.q_tokens, ranks)),
        kv=data.draw(owners(problem.kv_tokens, ranks)),
    )
    partition = data.draw(st.sampled_from([None, anyhow]))
    plan = Plan(problem, "hierarchical", ranks, partition=partition, node_size=node_size)
    check(plan, seed)


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("causal", ["none", "upper_left", "lower_right"])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(256, 256), (256, 1), (3, 192)])
def test_head_dims_up_to_256(
    strategy: StrategyName, causal: Any, head_dim: int, v_head_dim: int
) -> None:
    problem = AttentionProblem(301, 283, 4, 2, head_dim, v_head_dim, "bfloat16", causal)
    check(Plan(problem, strategy, 3), seed=7)


@pytest.mark.parametrize("strategy", NAMES)
def test_more_ranks_than_tokens_and_heads(strategy: StrategyName) -> None:
    for causal in ("none", "upper_left", "lower_right"):
        check(Plan(AttentionProblem(2, 5, 2, 1, 8, 8, "float16", causal), strategy, 13), seed=1)


@pytest.mark.parametrize("strategy", NAMES)
def test_rows_that_see_no_key_give_zero_and_minus_infinity(strategy: StrategyName) -> None:
    problem = AttentionProblem(20, 6, 2, 2, 8, 8, "bfloat16", "lower_right")
    out, lse = attend_in_group(Plan(problem, strategy, 4), *random_inputs(problem, 3))
    assert (out[:14] == 0).all()
    assert np.isneginf(lse[:14]).all()
    assert (np.abs(out[14:]) > 0).any(axis=(1, 2)).all()
    assert np.isfinite(lse[14:]).all()


@pytest.mark.parametrize("strategy", NAMES)
def test_same_bytes_twice(strategy: StrategyName) -> None:
    problem = AttentionProblem(530, 530, 4, 2, 32, 32, "bfloat16", "lower_right")
    inputs = random_inputs(problem, 11)
    first, second = (attend_in_group(Plan(problem, strategy, 4), *inputs) for _ in range(2))
    for once, again in zip(first, second, strict=True):
        assert once.tobytes() == again.tobytes()


@pytest.mark.parametrize("strategy", NAMES)
def test_inputs_are_left_alone(strategy: StrategyName) -> None:
    problem = AttentionProblem(50, 40, 4, 2, 8, 8, "float16", "upper_left")
    inputs = random_inputs(problem, 5)
    before = [array.tobytes() for array in inputs]
    attend_in_group(Plan(problem, strategy, 3), *inputs)
    assert [array.tobytes() for array in inputs] == before


def test_the_partition_of_a_plan_is_the_one_used() -> None:
    """With equal shard sizes only the partition tells zigzag and contiguous tokens apart."""
    problem = AttentionProblem(32, 32, 1, 1, 8, 8, "float16", "upper_left")
    inputs = random_inputs(problem, 9)
    contiguous = Partition(
        tuple((span,) for span in split(32, 2)), tuple((span,) for span in split(32, 2))
    )
    zigzag = partition(problem, "ring", 2)
    right = attention(problem, *inputs)
    for owner in (contiguous, zigzag):
        plan = Plan(problem, "ring", 2, partition=owner)
        assert_close(problem, *attend_in_group(plan, *inputs), right)
    swapped = attend_in_group(Plan(problem, "ring", 2, partition=contiguous), *inputs, held=zigzag)
    assert np.abs(swapped[0].astype(float) - right[0]).max() > 0.1
