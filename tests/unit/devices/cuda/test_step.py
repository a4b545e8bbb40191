"""Recorded steps: what is replayed is right in whatever order the GPUs do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.replaying import ReplayingDevice
from mdattn_mpi.devices.cuda.windows import Windows
from mdattn_mpi.partition import partition_of
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName
from mdattn_mpi.strategies import STRATEGIES
from tests.support.group import take
from tests.support.reference import TOLERANCE, attention, problems, random_inputs
from tests.unit.devices.cuda.test_device import in_group, whole_heads

Array = NDArray[Any]
Inputs = list[tuple[Array, ...]]
NAMES = get_args(StrategyName)


def shards_of(plan: Plan, arrays: tuple[Array, ...], rank: int) -> list[Array]:
    owners = partition_of(plan)
    spans = (owners.query, owners.kv, owners.kv)
    return [take(array, own[rank]) for array, own in zip(arrays, spans, strict=True)]


def in_a_batch(device: CudaDevice, plans: list[Plan], inputs: Inputs) -> list[Any]:
    """Begin an item before the one before it is enqueued."""
    downloads, running = [], None
    for plan, arrays in [*zip(plans, inputs, strict=True), (None, ())]:
        following = None
        if plan:
            shards = map(device.upload, shards_of(plan, arrays, device.rank))
            following = device.perform(STRATEGIES[plan.strategy], plan, *shards, ahead=True)
            next(following)
        if running:
            downloads.append(device.download(*end_of(running)))
        running = following
    return [download.wait() for download in downloads]


def one_by_one(device: CudaDevice, plans: list[Plan], inputs: Inputs) -> list[Any]:
    """Calls that stand alone, with arrays that are freed and overwritten at once."""
    downloads = []
    for plan, arrays in zip(plans, inputs, strict=True):
        shards = list(map(device.upload, shards_of(plan, arrays, device.rank)))
        steps = device.perform(STRATEGIES[plan.strategy], plan, *shards)
        next(steps)
        downloads.append(device.download(*end_of(steps)))
        for shard in shards:
            device.copy(device.upload(np.full(shard.shape, 7, shard.dtype)), shard)
        del shards, steps
    return [download.wait() for download in downloads]


def end_of(steps: Any) -> Any:
    with pytest.raises(StopIteration) as end:
        next(steps)
    return end.value.value


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

    def act(device: CudaDevice) -> Any:
        found = way(device, plans, inputs)
        assert isinstance(device, ReplayingDevice)
        counts.append(device.steps.counts["replayed"])
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
    plans = [Plan(whole_heads(some[which % len(some)]), name, ranks) for which, name in calls]
    check(plans, seed, way, kernel=kernel)


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
    plan = Plan(AttentionProblem(32, 32, 2, 2, 8, 8), "ring", 3)

    def wrong(seed: int) -> bool:
        try:
            check([plan] * 8, seed)
        except AssertionError:
            return True
        return False

    assert any(wrong(seed) for seed in range(20))
