"""What strategies send, hold and overlap, seen by a device that takes notes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from mdattn_mpi.devices.protocol import Message
from mdattn_mpi.mask import Band
from mdattn_mpi.partition import partition
from mdattn_mpi.problem import AttentionProblem, Plan, Span, StrategyName
from tests.support.group import attend, attend_in_group, take
from tests.support.loopback import LoopbackDevice, LoopbackTransfer, run_ranks
from tests.support.reference import random_inputs

Array = NDArray[Any]
NAMES = get_args(StrategyName)


class Spy(LoopbackDevice):
    """Takes notes of verbs, of bytes sent to others and of the most bytes alive at a time."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.verbs: list[str] = []
        self.sent = 0
        self.calls = 0
        self.live = 0
        self.peak = 0

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        array = super().empty(shape, like)
        self._count(array.nbytes)
        weakref.finalize(array, self._count, -array.nbytes)
        return array

    def _count(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def exchange(
        self, send: Sequence[Message[Array]], receive: Sequence[Message[Array]]
    ) -> LoopbackTransfer:
        self.verbs.append("exchange")
        self.sent += sum(array.nbytes for array, peer in send if peer != self.rank)
        return super().exchange(send, receive)

    def wait(self, transfer: LoopbackTransfer) -> None:
        self.verbs.append("wait")
        super().wait(transfer)

    def attend(self, accumulator: Any, rows: Span, k: Array, v: Array, band: Band) -> None:
        if not self.verbs or self.verbs[-1] != "attend":
            self.verbs.append("attend")
        self.calls += 1
        super().attend(accumulator, rows, k, v, band)


def watch(problem: AttentionProblem, strategy: StrategyName, ranks: int) -> list[Spy]:
    """Run a strategy; return the devices with their notes."""
    plan, inputs = Plan(problem, strategy, ranks), random_inputs(problem, 1)
    owners = partition(problem, strategy, ranks)

    def run(device: Spy) -> Spy:
        q, k, v = inputs
        shards = (
            take(q, owners.query[device.rank]),
            *(take(array, owners.kv[device.rank]) for array in (k, v)),
        )
        attend(device, plan, *shards)
        return device

    return run_ranks(ranks, run, device=Spy)


def full(tokens: int, causal: Any = "none") -> AttentionProblem:
    return AttentionProblem(tokens, tokens, 4, 2, 16, 16, "bfloat16", causal)


@pytest.mark.parametrize("causal", ["none", "upper_left", "lower_right"])
def test_ring_has_the_next_shard_under_way_while_it_attends(causal: str) -> None:
    for spy in watch(full(64, causal), "ring", 4):
        assert spy.verbs == [*["exchange", "attend", "wait"] * 3, "attend"]


@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
def test_gathering_strategies_attend_once(strategy: StrategyName) -> None:
    back = ["exchange", "wait"] if strategy == "ulysses" else []
    for spy in watch(full(64), strategy, 2):
        assert spy.verbs == ["exchange", "wait", "attend", *back]
        assert spy.calls == 1


@pytest.mark.parametrize("strategy", NAMES)
def test_transfers_are_under_way_before_the_yield_and_nothing_is_computed(
    strategy: StrategyName,
) -> None:
    problem = full(32)
    plan, owners = Plan(problem, strategy, 2), partition(problem, strategy, 2)
    inputs = random_inputs(problem, 2)

    def run(device: Spy) -> None:
        from mdattn_mpi.strategies import STRATEGIES

        shards = [take(array, owners.kv[device.rank]) for array in inputs]
        steps = STRATEGIES[strategy](device, plan, *shards)
        next(steps)
        assert device.verbs == ["exchange"]
        with pytest.raises(StopIteration):
            next(steps)

    run_ranks(2, run, device=Spy)


@pytest.mark.parametrize("strategy", NAMES)
def test_one_item_may_be_begun_while_another_computes(strategy: StrategyName) -> None:
    problems = [full(32), full(50, "upper_left"), full(17, "lower_right")]
    inputs = [random_inputs(problem, 3) for problem in problems]
    plans = [Plan(problem, strategy, 3) for problem in problems]
    alone = [attend_in_group(plan, *arrays) for plan, arrays in zip(plans, inputs, strict=True)]

    def run(device: Spy) -> list[Any]:
        from mdattn_mpi.strategies import STRATEGIES

        started = []
        for plan, (q, k, v) in zip(plans, inputs, strict=True):
            owners = partition(plan.problem, strategy, 3)
            query, kv = owners.query[device.rank], owners.kv[device.rank]
            steps = STRATEGIES[strategy](device, plan, take(q, query), take(k, kv), take(v, kv))
            next(steps)
            started.append(steps)
        results = []
        for steps in started:
            with pytest.raises(StopIteration) as end:
                next(steps)
            results.append(end.value.value)
        return results

    for rank, results in enumerate(run_ranks(3, run, device=Spy)):
        for plan, (out, lse), whole in zip(plans, results, alone, strict=True):
            spans = partition(plan.problem, strategy, 3).query[rank]
            assert out.tobytes() == take(whole[0], spans).tobytes()
            assert lse.tobytes() == take(whole[1], spans).tobytes()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_sent_by_a_rank(ranks: int) -> None:
    problem = AttentionProblem(64, 64, 8, 8, 16, 16)
    shard = problem.kv_bytes // ranks
    heads = 4 * 2 * 64 * 8 * 16 // ranks**2 + 4 * 64 * 8 // ranks**2  # Q, K, V, output; LSE
    for strategy, expected in (
        ("ring", (ranks - 1) * shard),
        ("allgather", (ranks - 1) * shard),
        ("ulysses", (ranks - 1) * heads),
    ):
        assert {spy.sent for spy in watch(problem, strategy, ranks)} == {expected}  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", ["none", "lower_right"])
def test_ring_holds_two_shards_beside_its_own(causal: str) -> None:
    problem = full(512, causal)
    for ranks in (2, 4, 8, 16):
        shards = min(2, ranks - 1)
        for spy in watch(problem, "ring", ranks):
            assert spy.peak == shards * problem.kv_bytes // ranks


def test_allgather_holds_all_of_k_and_v() -> None:
    for spy in watch(full(64), "allgather", 4):
        assert spy.peak == full(64).kv_bytes


def test_a_single_rank_sends_and_copies_nothing_in_a_ring() -> None:
    (spy,) = watch(full(64, "upper_left"), "ring", 1)
    assert (spy.sent, spy.peak, spy.calls, spy.verbs) == (0, 0, 1, ["attend"])


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
def test_causal_calls_are_few(strategy: StrategyName) -> None:
    for spy in watch(full(16 * 8, "upper_left"), strategy, 8):
        assert spy.calls <= (9 if strategy == "ring" else 2)


def test_what_a_causal_ring_need_not_see_is_not_attended_to() -> None:
    """Two queries at the start of the sequence see two keys: one rank in eight has work."""
    problem = AttentionProblem(2, 64, 1, 1, 8, 8, causal="upper_left")
    spies = watch(problem, "ring", 8)
    assert sum(spy.calls for spy in spies) == 2
    assert sum(np.array([spy.calls for spy in spies]) > 0) == 2


def test_memory_of_a_ring_at_131072_tokens_halves_as_ranks_double() -> None:
    """The rank's own K and V and the buffers; nothing is computed, so that it takes no time."""

    class Idle(Spy):
        def attend(self, *_: Any) -> None:
            pass

    problem = AttentionProblem(131072, 131072, 1, 1, 128, 128, causal="lower_right")
    nothing = np.zeros((131072, 1, 128), np.float16)

    def held(device: Spy) -> int:
        owners = partition(problem, "ring", device.ranks)
        q, k, v = (
            take(nothing, spans[device.rank]) for spans in (owners.query, owners.kv, owners.kv)
        )
        attend(device, Plan(problem, "ring", device.ranks), q, k, v)
        return device.peak + k.nbytes + v.nbytes

    mib = {ranks: set(run_ranks(ranks, held, device=Idle)) for ranks in (1, 2, 4, 8, 16)}
    assert mib == {ranks: {n << 20} for ranks, n in {1: 64, 2: 64, 4: 48, 8: 24, 16: 12}.items()}
