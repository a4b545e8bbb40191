"""Recorded steps: what is replayed is right in whatever order the GPUs do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda import step
from mdattn_mpi.devices.cuda.replaying import ReplayingDevice
from mdattn_mpi.devices.cuda.windows import Windows
from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.errors import DeviceError
from mdattn_mpi.partition import partition_of
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName
from mdattn_mpi.strategies import STRATEGIES
from tests.support import fake_gpu
from tests.support.group import take
from tests.support.reference import TOLERANCE, attention, problems, random_inputs
from tests.unit.devices.cuda.test_device import count_calls, for_kernel, in_group

Array = NDArray[Any]
Inputs = list[tuple[Array, ...]]
NAMES = get_args(StrategyName)


def shards_of(plan: Plan, arrays: tuple[Array, ...], rank: int) -> list[Array]:
    owners = partition_of(plan)
    spans = (owners.query, owners.kv, owners.kv)
    shards = [take(array, own[rank]) for array, own in zip(arrays, spans, strict=False)]
    return [*shards, *arrays[3:]]  # sinks


def in_a_batch(device: Any, plans: list[Plan], inputs: Inputs) -> list[Any]:
    """Begin an item before the one before it is enqueued."""
    downloads, running = [], None
    for plan, arrays in [*zip(plans, inputs, strict=True), (None, ())]:
        following = None
        if plan:
            shards = map(device.upload, shards_of(plan, arrays, device.rank))
            following = device.perform(STRATEGIES[plan.strategy], plan, *shards, ahead=True)
            next(following)
        if running:
            downloads.append(device.download(*run_to_end(running)))
        running = following
    return [download.wait() for download in downloads]


def one_by_one(device: Any, plans: list[Plan], inputs: Inputs) -> list[Any]:
    """Calls that stand alone, with arrays that are freed and overwritten at once."""
    downloads = []
    for plan, arrays in zip(plans, inputs, strict=True):
        shards = list(map(device.upload, shards_of(plan, arrays, device.rank)))
        steps = device.perform(STRATEGIES[plan.strategy], plan, *shards)
        next(steps)
        downloads.append(device.download(*run_to_end(steps)))
        for shard in shards:
            device.copy(device.upload(np.full(shard.shape, 7, shard.dtype)), shard)
        del shards, steps
    return [download.wait() for download in downloads]


def check(
    plans: list[Plan],
    seed: int,
    way: Callable[..., Any] = one_by_one,
    *,
    replayed: int | None = None,
    **options: Any,
) -> None:
    """Compare with float64; count the calls that were replayed."""
    inputs = [random_inputs(plan.problem, seed + index) for index, plan in enumerate(plans)]
    counts: list[int] = []

    def act(device: Any) -> Any:
        found = way(device, plans, inputs)
        assert isinstance(device, ReplayingDevice)
        counts.append(device.steps.counts["replayed"])
        assert device.steps.why_not == ""
        return found

    shards = in_group(plans[0].ranks, act, seed, **options)
    assert replayed is None or counts == [replayed] * plans[0].ranks
    for index, (plan, arrays) in enumerate(zip(plans, inputs, strict=True)):
        right, right_lse = attention(plan.problem, *arrays)
        bound = 2 * TOLERANCE[plan.problem.dtype]
        for spans, results in zip(partition_of(plan).query, shards, strict=True):
            wanted, wanted_lse = take(right, spans), take(right_lse, spans)
            out, lse = results[index]
            assert (np.abs(out.astype(float) - wanted) <= bound * (1 + np.abs(wanted))).all()
            np.testing.assert_allclose(lse, wanted_lse, rtol=1e-4, atol=1e-4)


PROBLEM = AttentionProblem(37, 41, 4, 2, 16, 8, "bfloat16", "lower_right")


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("way", [one_by_one, in_a_batch])
@pytest.mark.parametrize("ranks", [2, 3])
def test_calls_of_one_plan_are_replayed(
    strategy: StrategyName, way: Callable[..., Any], ranks: int
) -> None:
    check([Plan(PROBLEM, strategy, ranks)] * 12, ranks, way, replayed=11)


@pytest.mark.parametrize("way", [one_by_one, in_a_batch])
@settings(max_examples=8, deadline=None)
@given(
    st.lists(problems(max_tokens=24), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from(NAMES)), min_size=3, max_size=9),
    st.integers(2, 4),
    st.integers(0, 10**6),
    st.sampled_from(["cudnn", "flash"]),
)
def test_whatever_plans_take_turns_the_results_are_right(
    way: Callable[..., Any],
    some: list[AttentionProblem],
    calls: list[tuple[int, StrategyName]],
    ranks: int,
    seed: int,
    kernel: str,
) -> None:
    plans = [
        Plan(for_kernel(some[which % len(some)], kernel), name, ranks) for which, name in calls
    ]
    check(plans, seed, way, kernel=kernel)


def lone_calls(device: Any, plan: Plan, calls: int, **options: Any) -> Any:
    """Attend to the same arrays again and again; yield before each call."""
    shards = list(map(device.upload, shards_of(plan, random_inputs(plan.problem, 1), device.rank)))
    for _ in range(calls):
        yield
        steps = device.perform(STRATEGIES[plan.strategy], plan, *shards, **options)
        next(steps)
        run_to_end(steps)


@pytest.mark.parametrize("strategy", NAMES)
def test_a_replay_asks_the_driver_for_next_to_nothing(strategy: StrategyName) -> None:
    def act(device: Any) -> list[int]:
        asked: list[int] = []
        count_calls(device._gpu, asked)
        for _ in lone_calls(device, Plan(PROBLEM, strategy, 2), 16):
            asked.append(0)
        return asked[10:]

    # A launch, and what the memory of the output has to wait for.
    for counts in in_group(2, act):
        assert all(1 <= count <= 3 for count in counts), counts


def test_addresses_that_come_again_have_a_recording_of_their_own() -> None:
    def act(device: Any) -> tuple[int, int]:
        for _ in lone_calls(device, Plan(PROBLEM, "ring", 2), 10):
            pass
        launched: list[Any] = []
        launch = device._gpu.launch
        device._gpu.launch = lambda graph, stream: (launched.append(graph), launch(graph, stream))
        steps = device.steps
        for _ in lone_calls(device, Plan(PROBLEM, "ring", 2), 10):
            pass
        (step,) = steps._steps.values()
        (frame,) = step.frames
        assert frame.copied.graphs[0] not in launched[-4:]
        return steps.counts["recorded"], len(frame.direct)

    for recorded, kept in in_group(2, act):
        assert 1 <= recorded <= 12
        assert kept <= 8


@pytest.mark.parametrize("when", [1, 2])
def test_where_a_rank_cannot_record_all_do_without(when: int) -> None:
    def act(device: Any) -> tuple[str, int]:
        if device.rank == 1:
            ends = iter(range(100))
            end = device._gpu.end_capture

            def end_capture(stream: Any) -> Any:
                graph = end(stream)
                if next(ends) + 1 == when:
                    raise DeviceError("not this time")
                return graph

            device._gpu.end_capture = end_capture
        for _ in lone_calls(device, Plan(PROBLEM, "ring", 2), 5):
            pass
        (step,) = device.steps._steps.values()
        return step.why_not, device.steps.counts["replayed"]

    assert in_group(2, act) == [("another rank can't", 0), ("not this time", 0)]


def test_what_is_too_large_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "MOST_BYTES", 4 * 1000)
    check([Plan(PROBLEM, "ring", 2)] * 4, 1, replayed=0)


def test_in_a_batch_what_hides_its_host_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "HIDES_HOST", 0.0)
    check([Plan(PROBLEM, "ring", 2)] * 4, 1, in_a_batch, replayed=0)
    check([Plan(PROBLEM, "ring", 2)] * 4, 1, one_by_one, replayed=3)


@pytest.mark.parametrize("way", [one_by_one, in_a_batch])
def test_old_steps_make_room_for_new_ones(
    monkeypatch: pytest.MonkeyPatch, way: Callable[..., Any]
) -> None:
    monkeypatch.setattr(step, "MOST", 3)
    problems = [AttentionProblem(n, n, 2, 2, 8, 8) for n in (20, 24, 28, 32, 36)]
    plans = [Plan(problem, "ring", 2) for problem in problems for _ in range(4)]
    used: list[int] = []

    def way_and_size(device: Any, *args: Any) -> Any:
        found = way(device, *args)
        assert len(device.steps._steps) <= 3
        used.append(device.memory.in_use)
        return found

    check(plans + plans, 3, way_and_size)
    check(plans, 3, way_and_size)
    assert len(set(used)) == 1  # twice as many calls hold no more


def skip(kind: int) -> Callable[..., Any]:
    take_flag = Windows._take

    def take(windows: Windows, which: int, peer: int) -> None:
        if which != kind:
            take_flag(windows, which, peer)

    return take


@pytest.mark.parametrize("kind", [0, 1])
def test_without_one_of_the_flags_it_would_be_wrong(
    monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    monkeypatch.setattr(Windows, "_take", skip(kind))
    monkeypatch.setattr(fake_gpu, "DEADLINE", 1.0)
    plan = Plan(AttentionProblem(32, 32, 2, 2, 8, 8), "ring", 3)

    def wrong(seed: int) -> bool:
        try:
            check([plan] * 8, seed)
        except AssertionError:
            return True
        return False

    assert any(wrong(seed) for seed in range(20))
