"""The one cost model: its parts against what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.costs import cpu_costs, gpu_costs, typical_costs
from mdattn_mpi.estimate import (
    ASKING,
    REPLAYING,
    estimate,
    head_start,
    host_seconds,
    input_bytes,
    item_seconds,
    least_memory,
    least_ranks,
    output_bytes,
)
from mdattn_mpi.mask import Mask
from mdattn_mpi.partition import partition
from mdattn_mpi.problem import FLAT_STRATEGIES, STRATEGY_NAMES, AttentionProblem, Partition, Span
from tests.support.reference import problems

GPU = typical_costs("cuda")
LONG = AttentionProblem(131072, 131072, 32, 8, 128, 128)


@given(problem=problems(max_tokens=10**5, max_head_dim=256), ranks=st.integers(1, 64))
def test_even_shares_are_what_the_partition_of_a_strategy_gives(
    problem: AttentionProblem, ranks: int
) -> None:
    for name in STRATEGY_NAMES:
        owners = partition(problem, name, ranks)
        even = estimate(problem, ranks, name, GPU, batch=True)
        exact = estimate(problem, ranks, name, GPU, batch=True, owners=owners)
        assert even.memory == exact.memory
        assert even.exchange == exact.exchange
        if problem.mask == Mask():
            assert even == exact


def test_a_rank_that_owns_more_takes_longer() -> None:
    causal = replace(LONG, causal="upper_left")
    halves = tuple((span,) for span in (Span(0, 65536), Span(65536, 131072)))
    lopsided = Partition(halves, halves)
    even, uneven = (
        estimate(causal, 2, "ring", GPU, batch=True, owners=owners) for owners in (None, lopsided)
    )
    assert uneven.compute == pytest.approx(1.5 * even.compute, rel=1e-4)


def test_what_is_measured_on_an_h200_is_about_what_is_estimated() -> None:
    """115.6 ms on one, 59.4 ms on two (docs/performance.md)."""
    problem = AttentionProblem(65536, 65536, 32, 8, 128, 128)
    one, two = (estimate(problem, ranks, "ring", GPU, batch=False).seconds for ranks in (1, 2))
    assert one == pytest.approx(0.1158, rel=0.1)
    assert two == pytest.approx(0.0594, rel=0.1)


def test_files_bound_an_item_that_computes_for_less() -> None:
    short = AttentionProblem(4096, 4096, 8, 8, 128, 128)
    assert (input_bytes(short), output_bytes(short)) == (3 * 8 << 20, 8 << 20)
    assert item_seconds(short, 2, GPU) == GPU.item + (24 << 20) / 2 / GPU.reading
    slow_output = replace(GPU, writing=1e8)
    assert item_seconds(short, 2, slow_output) == GPU.item + (8 << 20) / 2 / 1e8
    million = AttentionProblem(1 << 20, 1 << 20, 8, 8, 128, 128)
    assert item_seconds(million, 2, GPU) > million.flops / 2 / GPU.flops


def test_a_core_reads_writes_and_computes_one_after_the_other() -> None:
    problem, cpu = AttentionProblem(4096, 4096, 8, 8, 128, 128), cpu_costs()
    no_files = replace(cpu, reading=float("inf"), writing=float("inf"))
    files = (24 << 20) / cpu.reading + (8 << 20) / cpu.writing
    assert item_seconds(problem, 1, cpu) == pytest.approx(
        item_seconds(problem, 1, no_files) + files
    )


def test_a_strategy_that_does_not_fit_is_not_counted_on() -> None:
    few_heads = AttentionProblem(131072, 131072, 2, 2, 128, 128)
    slow = replace(GPU, bandwidth=1e8)
    tight = replace(slow, memory=least_memory(few_heads, 8, slow))
    assert item_seconds(few_heads, 8, tight) >= item_seconds(few_heads, 8, slow)


@given(
    problem=problems(max_tokens=3000, max_head_dim=64),
    memory=st.integers(1 << 10, 1 << 22),
)
def test_least_ranks_is_the_smallest_number_that_fits(
    problem: AttentionProblem, memory: int
) -> None:
    costs = replace(GPU, memory=memory)
    found = least_ranks(problem, costs)
    longest = max(problem.q_tokens, problem.kv_tokens)
    fitting = (
        ranks for ranks in range(1, longest + 1) if least_memory(problem, ranks, costs) <= memory
    )
    assert found == next(fitting, None)


def test_hardware_differs_by_architecture_links_and_backend() -> None:
    h200, blackwell, far = gpu_costs(9, 132), gpu_costs(10, 148), gpu_costs(9, 132, near=False)
    assert h200 == GPU == typical_costs("tensorrt")
    assert blackwell.flops > h200.flops
    assert far.bandwidth < h200.bandwidth
    assert typical_costs("cpu", memory=5) == cpu_costs(5)
    assert (GPU.preparing, cpu_costs().preparing) == (0.04, 0.0)


def test_head_start_is_whole_waves_of_tiles() -> None:
    problem = AttentionProblem(32768, 32768, 8, 8, 128, 128)
    assert head_start(problem, 1, GPU) == 0
    assert head_start(AttentionProblem(4096, 4096, 8, 8, 128, 128), 2, GPU) == 0
    rows = head_start(problem, 2, GPU)
    assert 0 < rows <= 16384
    assert rows % (132 // 8 * 128) == 0
    assert head_start(problem, 2, cpu_costs()) == 0


def test_what_the_last_wave_of_tiles_leaves_idle() -> None:
    """4096 tiles on 132 multiprocessors are 31.03 waves: 32; in two halves 62.06: 63 of half."""
    problem = AttentionProblem(131072, 131072, 8, 8, 128, 128)
    even = replace(GPU, multiprocessors=0)
    for name, waves in (("allgather", 32 / (4096 / 132)), ("ring", 63 / (8192 / 132))):
        with_idle, without = (
            estimate(problem, 2, name, costs, batch=True).compute  # type: ignore[arg-type]
            for costs in (GPU, even)
        )
        assert with_idle == pytest.approx(waves * without)
    causal = replace(problem, causal="upper_left")
    assert estimate(causal, 2, "ring", GPU, batch=True) == estimate(
        causal, 2, "ring", even, batch=True
    )


def test_no_group_is_faster_than_its_host() -> None:
    tiny = AttentionProblem(256, 256, 8, 8, 128, 128)
    far = gpu_costs(9, 132, near=False)
    for batch in (False, True):
        for name in FLAT_STRATEGIES:
            alone, group, across = (
                estimate(tiny, ranks, name, costs, batch=batch).seconds
                for ranks, costs in ((1, GPU), (8, GPU), (8, far))
            )
            assert alone < REPLAYING <= group < across == 8 * ASKING[name]
            assert group == REPLAYING or name == "ring"  # whose seven hops take longer
            cores = estimate(tiny, 8, name, cpu_costs(), batch=batch).seconds
            assert host_seconds(name, 8, cpu_costs()) == 0 < cores


def test_replayed_steps_are_about_what_was_measured_on_two_h200s() -> None:
    """docs/performance.md: a lone ring of 8k 0.216 ms, of 16k 0.791, beside 0.380 and 1.508 of one
    GPU with FlashAttention, whose own speed isn't the model's: shares of ideal 0.89 and 0.95.
    """
    for tokens, share in ((8192, 0.89), (16384, 0.95)):
        problem = AttentionProblem(tokens, tokens, 8, 8, 128, 128)
        one, two = (estimate(problem, ranks, "ring", GPU, batch=False).seconds for ranks in (1, 2))
        assert one / 2 / two == pytest.approx(share, abs=0.04)
