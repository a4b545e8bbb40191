"""`auto` picks what fits and is fast, says why, and refuses what can't fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.costs import Costs, gpu_costs
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.estimate import estimate
from mdattn_mpi.problem import FLAT_STRATEGIES, STRATEGY_NAMES, AttentionProblem
from mdattn_mpi.strategies import STRATEGIES, choose
from mdattn_mpi.strategies.auto import TIE
from tests.support.reference import problems

GPU = Costs(flops=6e14, bandwidth=2.8e11, latency=2e-5, merge=2e12, call=1e-5)
SLOW_NETWORK = replace(GPU, bandwidth=1e9)
LONG = AttentionProblem(131072, 131072, 32, 8, 128, 128)


def test_every_name_has_a_strategy() -> None:
    assert tuple(STRATEGIES) == STRATEGY_NAMES


def test_one_rank_has_nothing_to_choose() -> None:
    name, reasons = choose(LONG, 1, "auto", GPU)
    assert name == "ring"
    assert "one rank" in reasons[0]


def test_long_items_in_a_batch_are_gathered_for_nothing_is_merged() -> None:
    assert choose(LONG, 4, "auto", GPU)[0] == "allgather"


def test_ring_where_all_of_k_and_v_don_t_fit() -> None:
    most = estimate(LONG, 8, "ring", GPU, batch=True).memory
    name, reasons = choose(LONG, 8, "auto", replace(GPU, memory=most))
    assert name == "ring"
    assert any("does not fit" in reason and "allgather" in reason for reason in reasons)


def test_ring_for_a_single_long_item_over_a_slow_network_with_few_kv_heads() -> None:
    problem = AttentionProblem(32768, 32768, 32, 1, 128, 128)
    assert choose(problem, 4, "auto", SLOW_NETWORK, batch=False)[0] != "allgather"


def test_ulysses_where_heads_divide_and_the_network_is_the_limit() -> None:
    problem = AttentionProblem(4096, 4096, 32, 32, 128, 128)
    assert choose(problem, 8, "auto", SLOW_NETWORK)[0] == "ulysses"


def test_too_few_heads_make_ulysses_slow() -> None:
    problem = AttentionProblem(65536, 65536, 2, 2, 128, 128)
    slow, fast = (estimate(problem, 8, name, GPU, batch=True) for name in ("ulysses", "ring"))  # type: ignore[arg-type]
    assert slow.compute == pytest.approx(4 * fast.compute)


def test_what_the_user_asked_for_is_taken() -> None:
    for name in FLAT_STRATEGIES:
        assert choose(LONG, 4, name, GPU) == (name, choose(LONG, 4, name, GPU)[1])


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    enough = estimate(LONG, 8, "ring", GPU, batch=True).memory
    with pytest.raises(RejectedError, match=r"allgather.*Fix: use -s ring"):
        choose(LONG, 8, "allgather", replace(GPU, memory=enough))
    with pytest.raises(RejectedError, match="Fix: no number of ranks is enough"):
        choose(LONG, 8, "auto", replace(GPU, memory=1000))


NODES = replace(gpu_costs(9, 132, near=False, node_size=8, exact_merge=True), bandwidth=5e10)


def test_over_nodes_what_travels_between_them_decides() -> None:
    """128k tokens under a causal mask on 8 nodes, at 400 Gb/s a GPU."""
    problem = replace(LONG, causal="upper_left")
    name, reasons = choose(problem, 64, "auto", NODES)
    assert name == "hierarchical"
    assert len(reasons) == 4
    assert choose(problem, 64, "hierarchical", NODES)[0] == "hierarchical"
    # As fast between nodes as within them, nothing is gained that a plain ring doesn't have.
    one = replace(NODES, bandwidth=NODES.near_bandwidth)
    assert choose(problem, 64, "auto", one)[0] != "hierarchical"
    assert choose(replace(problem, window=(4095, 0)), 64, "auto", NODES)[0] != "hierarchical"
    # Ulysses moves least over many nodes, where there are heads enough.
    many = replace(LONG, q_heads=64, kv_heads=64)
    assert choose(many, 64, "auto", replace(NODES, bandwidth=1e9))[0] == "ulysses"


@pytest.mark.parametrize(("ranks", "node_size"), [(8, 1), (8, 8), (12, 8), (4, 8)])
def test_without_nodes_to_make_a_ring_of_it_is_refused(ranks: int, node_size: int) -> None:
    costs = replace(NODES, node_size=node_size)
    with pytest.raises(RejectedError, match=r"several nodes.*ppr:N:node.*-s ring"):
        choose(LONG, ranks, "hierarchical", costs)
    assert choose(LONG, ranks, "auto", costs)[0] != "hierarchical"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RejectedError, match=r"'star'.*ring"):
        choose(LONG, 2, "star", GPU)  # type: ignore[arg-type]


@given(
    problem=problems(max_tokens=10**6, max_head_dim=256),
    ranks=st.integers(1, 64),
    bandwidth=st.sampled_from([1e9, 1e11]),
    batch=st.booleans(),
)
def test_the_choice_is_within_a_tie_of_the_best_and_always_the_same(
    problem: AttentionProblem, ranks: int, bandwidth: float, batch: bool
) -> None:
    costs: Any = replace(GPU, bandwidth=bandwidth)
    name, reasons = choose(problem, ranks, "auto", costs, batch=batch)
    found = {n: estimate(problem, ranks, n, costs, batch=batch) for n in FLAT_STRATEGIES}
    assert all(e.seconds > 0 and e.memory > 0 for e in found.values())
    if ranks > 1:
        assert found[name].seconds <= TIE * min(e.seconds for e in found.values())
        assert reasons[0].startswith(f"{name}: chosen")
        assert len(reasons) == 3
    assert choose(problem, ranks, "auto", costs, batch=batch) == (name, reasons)


def test_memory_of_a_ring_falls_with_the_ranks_and_that_of_allgather_does_not() -> None:
    ring, gathered = (
        [estimate(LONG, p, name, GPU, batch=False).memory for p in (4, 8, 16)]  # type: ignore[arg-type]
        for name in ("ring", "allgather")
    )
    assert ring[0] == pytest.approx(2 * ring[1]) == pytest.approx(4 * ring[2])
    assert gathered[2] > LONG.kv_bytes


FLASH = gpu_costs(9, 132, exact_merge=True)


@pytest.mark.parametrize(
    ("length", "q_heads", "head_dim", "causal", "chosen"),
    [
        (131072, 8, 128, "none", "ring"),
        (131072, 8, 128, "upper_left", "ring"),
        (131072, 8, 64, "none", "ring"),
        (32768, 8, 128, "none", "allgather"),
        (65536, 32, 128, "upper_left", "allgather"),
    ],
)
def test_where_merging_loses_nothing_the_fastest_is_taken(
    length: int, q_heads: int, head_dim: int, causal: Any, chosen: str
) -> None:
    """The faster ones on two H100s, by 2 % and more (docs/performance.md, FlashAttention)."""
    shape = length, length, q_heads, 8, head_dim, head_dim
    problem = AttentionProblem(*shape, "bfloat16", causal)
    assert choose(problem, 2, "auto", FLASH, batch=False)[0] == chosen
    rounded = replace(FLASH, exact_merge=False)
    assert choose(problem, 2, "auto", rounded, batch=False)[0] == "allgather"


def test_a_group_that_is_slower_than_one_of_its_ranks_says_so() -> None:
    """2k tokens are done before a host has asked two GPUs for them; of 8k two do 0.216 ms."""
    short, long = (AttentionProblem(n, n, 8, 8, 128, 128) for n in (2048, 8192))
    for strategy in ("auto", *FLAT_STRATEGIES):
        for ranks in (2, 4, 8):
            _, reasons = choose(short, ranks, strategy, FLASH, batch=False)  # type: ignore[arg-type]
            assert "one rank alone would take 42 µs" in reasons[0]
            assert not any("alone" in reason for reason in reasons[1:])
    for problem, ranks in ((long, 2), (long, 8), (short, 1)):
        assert "alone" not in choose(problem, ranks, "auto", FLASH, batch=False)[1][0]
    too_large = replace(FLASH, memory=estimate(short, 8, "ring", FLASH, batch=False).memory)
    assert "alone" not in choose(short, 8, "ring", too_large, batch=False)[1][0]
