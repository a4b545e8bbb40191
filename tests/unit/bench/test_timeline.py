"""Virtual time against what can be worked out by hand."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.bench.timeline import (
    Compute,
    Exchange,
    Timings,
    calls,
    host_seconds,
    simulate,
    trace,
)
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName
from mdattn_mpi.strategies import STRATEGIES

NAMES: tuple[StrategyName, ...] = ("ring", "allgather", "ulysses")


def plan_of(strategy: StrategyName, ranks: int, causal: str = "none", tokens: int = 960) -> Plan:
    problem = AttentionProblem(tokens, tokens, 8, 4, 64, 64, causal=causal)  # type: ignore[arg-type]
    return Plan(problem, strategy, ranks)


class PerPair(defaultdict):  # type: ignore[type-arg]
    """An ideal kernel: one microsecond for 10⁴ query–key pairs of one head."""

    def __missing__(self, call):  # type: ignore[no-untyped-def]
        pairs = call.q_rows * call.kv_rows
        if call.band.after is not None:
            pairs -= call.q_rows * (call.q_rows - 1) // 2
        return pairs * call.q_heads * 1e-10


IDEAL = Timings(PerPair(), bandwidth=1e30, latency=0.0, memory=1e30)


def seconds(plan: Plan, timings: Timings = IDEAL, items: int = 1) -> float:
    return simulate(trace(plan, STRATEGIES[plan.strategy], items), timings)


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_with_ideal_links_ranks_divide_the_work(strategy: StrategyName, ranks: int) -> None:
    alone = 960 * 960 * 8 * 1e-10
    assert seconds(plan_of(strategy, ranks)) == pytest.approx(alone / ranks, rel=1e-9)


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_divides_causal_work_too(strategy: StrategyName, ranks: int) -> None:
    alone = 960 * 961 / 2 * 8 * 1e-10
    assert seconds(plan_of(strategy, ranks, "upper_left")) == pytest.approx(alone / ranks, rel=0.01)


def test_a_slow_link_holds_the_ring_up_at_every_step() -> None:
    shard = 240 * 4 * (64 + 64) * 2
    timings = Timings(PerPair(), bandwidth=shard / 1.0, latency=0.5, memory=1e30)
    step = 240 * 240 * 8 * 1e-10
    # K and V are two messages through one port; the last shard is computed after it has come.
    assert seconds(plan_of("ring", 4), timings) == pytest.approx(3 * 1.5 + step, rel=1e-6)


def test_a_batch_hides_gathering_behind_the_item_before() -> None:
    plan = plan_of("allgather", 4)
    compute = seconds(plan)
    shard = 240 * 4 * (64 + 64) * 2
    # Gathering takes 0.9 of the computing: only that of the first item is seen.
    timings = Timings(PerPair(), bandwidth=3 * shard / (0.9 * compute), latency=0.0, memory=1e30)
    assert seconds(plan, timings, 10) == pytest.approx(0.9 * compute + 10 * compute, rel=1e-6)


def test_merging_is_paid_for_where_there_is_something_to_merge() -> None:
    timings = replace(IDEAL, merge=1e6, launch=0.5)
    row = 8 * 64 * 2 + 8 * 4
    merged = 0.5 + (480 * 2 + 480) * row / 1e6
    assert seconds(plan_of("ring", 2), timings) - seconds(plan_of("ring", 2)) == pytest.approx(
        merged
    )
    assert seconds(plan_of("ring", 1), timings) == pytest.approx(seconds(plan_of("ring", 1)))


def test_a_call_begins_in_what_the_end_of_another_leaves_idle() -> None:
    plan = plan_of("ring", 4)
    (call,) = calls(trace(plan, STRATEGIES["ring"]))
    alone, after = PerPair()[call], PerPair()[call] / 2
    overlapping = replace(IDEAL, after={call: after})
    assert seconds(plan, overlapping) == pytest.approx(alone + 3 * after)
    # Where a shard is waited for, nothing is left to overlap with.
    waiting = replace(overlapping, latency=10 * alone)
    assert seconds(plan, waiting) == pytest.approx(3 * 10 * alone + alone)


def test_packing_heads_is_paid_for_by_the_byte() -> None:
    packed = 480 * (4 + 2 + 2) * 64 * 2  # q, k and v, those of the other rank's heads
    unpacked = 480 * 4 * (64 * 2 + 4)
    slow = replace(IDEAL, memory=1e6)
    plan = plan_of("ulysses", 2)
    assert seconds(plan, slow) - seconds(plan) >= 2 * (packed + unpacked) / 1e6


@pytest.mark.parametrize(
    ("strategy", "messages", "kept", "attends"), [("ring", 3, 0, 4), ("allgather", 3, 2, 1)]
)
def test_the_host_asks_for_every_verb(
    strategy: StrategyName, messages: int, kept: int, attends: int
) -> None:
    # A ring passes on three times, to one neighbour and from the other; gathering goes to three
    # ranks and comes from them, and a rank keeps its own K and V.
    timings = replace(IDEAL, host={"message": 2.0, "copy": 0.5, "attend": 30.0, "finish": 500.0})
    traces = trace(plan_of(strategy, 4), STRATEGIES[strategy])
    wanted = 2.0 * messages + 0.5 * kept + 30.0 * attends + 500.0
    assert host_seconds(traces, timings) == wanted
    replayed = replace(timings, host={**timings.host, "replay": 1.0})
    assert host_seconds(traces, replayed) == (1.0 if len(traces) > 1 else wanted)


@given(
    st.sampled_from(NAMES),
    st.integers(1, 16),
    st.integers(1, 300),
    st.sampled_from(["none", "upper_left"]),
    st.integers(1, 3),
)
def test_every_message_finds_its_place(
    strategy: StrategyName, ranks: int, tokens: int, causal: str, items: int
) -> None:
    plan = plan_of(strategy, ranks, causal, tokens)
    traces = trace(plan, STRATEGIES[strategy], items)
    timings = Timings(PerPair(), bandwidth=1e9, latency=1e-6, memory=1e12)
    busiest = max(
        sum(timings.attend[verb.call] for verb in verbs if isinstance(verb, Compute) and verb.call)
        for verbs in traces
    )
    assert simulate(traces, timings) >= busiest
    assert all(call.q_rows <= tokens and call.kv_rows <= tokens for call in calls(traces))


def test_a_message_that_nobody_sends_is_noticed() -> None:
    traces = trace(plan_of("ring", 2), STRATEGIES["ring"])
    traces[0] = [verb for verb in traces[0] if not isinstance(verb, Exchange)]
    with pytest.raises(ValueError, match="nobody sends"):
        simulate(traces, IDEAL)
