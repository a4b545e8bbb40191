"""What strategies send, hold and overlap, seen by a device that takes notes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.devices.protocol import Message
from mdattn_mpi.partition import Block, contiguous, partition, token_count, zigzag
from mdattn_mpi.problem import AttentionProblem, Partition, Plan, StrategyName
from mdattn_mpi.strategies import STRATEGIES
from mdattn_mpi.strategies.rehearsal import Rehearsal, Shape
from tests.support.group import attend, attend_in_group, take
from tests.support.loopback import LoopbackDevice, LoopbackTransfer, run_ranks
from tests.support.reference import problems, random_inputs

Array = NDArray[Any]
NAMES = get_args(StrategyName)


class Spy(LoopbackDevice):
    """Takes notes of verbs, of bytes sent to others and of the most bytes alive at a time."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.verbs: list[str] = []
        self.sent = 0
        self.sent_to: Counter[int] = Counter()
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
        for array, peer in send:
            self.sent_to[peer] += array.nbytes
            self.sent += array.nbytes if peer != self.rank else 0
        return super().exchange(send, receive)

    def wait(self, transfer: LoopbackTransfer) -> None:
        self.verbs.append("wait")
        super().wait(transfer)

    def attend(self, accumulator: Any, blocks: Sequence[Block], k: Array, v: Array) -> None:
        if blocks and self.verbs[-1:] != ["attend"]:
            self.verbs.append("attend")
        self.calls += len(blocks)
        super().attend(accumulator, blocks, k, v)


def watch(
    problem: AttentionProblem, strategy: StrategyName, ranks: int, node_size: int = 1
) -> list[Spy]:
    """Run a strategy; return the devices with their notes."""
    plan = Plan(problem, strategy, ranks, node_size=node_size)
    inputs = random_inputs(problem, 1)
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
        assert set(device.verbs) == {"exchange"}
        with pytest.raises(StopIteration):
            next(steps)

    run_ranks(2, run, device=Spy)


@pytest.mark.parametrize("strategy", NAMES)
def test_one_item_may_be_begun_while_another_computes(strategy: StrategyName) -> None:
    items = [full(32), full(50, "upper_left"), full(17, "lower_right")]
    inputs = [random_inputs(problem, 3) for problem in items]
    plans = [Plan(problem, strategy, 3) for problem in items]
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


@pytest.mark.parametrize(("nodes", "node_size"), [(1, 4), (2, 2), (3, 2), (2, 4), (4, 1)])
def test_between_nodes_a_shard_travels_once(nodes: int, node_size: int) -> None:
    """Of a plain ring or gathering, a node's ranks are each sent all that is on other nodes."""
    ranks = nodes * node_size
    problem = AttentionProblem(24 * ranks, 24 * ranks, 4, 2, 16, 16, causal="upper_left")
    shard = problem.kv_bytes // ranks
    for spy in watch(problem, "hierarchical", ranks, node_size):
        node = range(spy.rank // node_size * node_size, (spy.rank // node_size + 1) * node_size)
        for peer in range(ranks):
            expected = nodes * shard if peer in node else 0
            if peer not in node and (peer - spy.rank) % ranks == node_size:
                expected = (nodes - 1) * shard
            assert spy.sent_to[peer] == expected
        assert spy.peak <= (2 * node_size + 3) * shard  # two gathered; sent, being sent, coming
        assert spy.calls <= nodes + 1


def test_a_ring_of_nodes_has_the_next_shards_under_way_while_it_attends() -> None:
    first, last = ["exchange"] * 2, ["wait", "wait", "exchange", "attend", "wait", "attend"]
    for spy in watch(full(72), "hierarchical", 6, 2):
        assert spy.verbs == [*first, "wait", "wait", "exchange", "exchange", "attend", *last]


@pytest.mark.parametrize("causal", ["none", "lower_right"])
def test_ring_holds_two_shards_beside_its_own(causal: str) -> None:
    problem = full(512, causal)
    for ranks in (2, 4, 8, 16):
        held = {spy.peak for spy in watch(problem, "ring", ranks)}
        assert max(held) == min(2, ranks - 1) * problem.kv_bytes // ranks
        assert len(held) == (1 if causal == "none" else 2)  # the last rank sees halves only


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

    mib = {ranks: max(run_ranks(ranks, held, device=Idle)) for ranks in (1, 2, 4, 8, 16)}
    assert mib == {ranks: n << 20 for ranks, n in {1: 64, 2: 64, 4: 48, 8: 24, 16: 12}.items()}


class Counting:
    """A device whose arrays have only a shape: counts the tokens of K that others send it."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.device = Rehearsal(rank, ranks)
        self.rank, self.ranks, self.received = rank, ranks, 0

    def exchange(self, send: Sequence[Message[Any]], receive: Sequence[Message[Any]]) -> None:
        coming = [array.shape for array, peer in receive if peer != self.rank]
        self.received += sum(tokens for tokens, *_, dim in coming if dim == K_DIM)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)


K_DIM = 24  # of keys; of values 16


def received(
    problem: AttentionProblem,
    strategy: StrategyName,
    ranks: int,
    owners: Partition | None = None,
) -> list[int]:
    """How many tokens of K each rank is sent by others."""
    problem = replace(problem, q_heads=1, kv_heads=1, head_dim=K_DIM, v_head_dim=16)
    owners, found = owners or partition(problem, strategy, ranks), []
    plan = Plan(problem, strategy, ranks, partition=owners)
    for rank in range(ranks):
        device = Counting(rank, ranks)
        tokens = (token_count(spans[rank]) for spans in (owners.query, owners.kv, owners.kv))
        shapes = (Shape(n, 1, dim) for n, dim in zip(tokens, (K_DIM, K_DIM, 16), strict=True))
        list(STRATEGIES[strategy](device, plan, *shapes))  # type: ignore[arg-type]
        found.append(device.received)
    return found


def needed(
    problem: AttentionProblem,
    strategy: StrategyName,
    ranks: int,
    owners: Partition | None = None,
) -> list[int]:
    """How many tokens of K each rank sees that another owns: from the definition."""
    owners, found = owners or partition(problem, strategy, ranks), []
    rows = np.arange(problem.q_tokens)
    first, last = np.zeros_like(rows), np.full_like(rows, problem.kv_tokens - 1)
    if problem.causal != "none":
        last = rows
    if problem.window[0] >= 0:
        first = np.maximum(first, rows - problem.window[0])
    if problem.window[1] >= 0:
        last = np.minimum(last, rows + problem.window[1])
    if problem.segments:
        starts = np.array([*problem.segments, problem.q_tokens])
        document = np.searchsorted(starts, rows, side="right") - 1
        first = np.maximum(first, starts[document])
        last = np.minimum(last, starts[document + 1] - 1)
    for query, own in zip(owners.query, owners.kv, strict=True):
        ends = np.zeros(problem.kv_tokens + 1, int)
        for span in query:
            np.add.at(ends, first[span.slice], 1)
            np.add.at(ends, last[span.slice] + 1, -1)
        seen = ends.cumsum()[:-1] > 0
        for span in own:
            seen[span.slice] = False
        found.append(int(seen.sum()))
    return found


SHARES = contiguous, zigzag
LONG = AttentionProblem(1 << 20, 1 << 20, 1, 1, 24, 16)


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
@pytest.mark.parametrize(("causal", "window"), [("upper_left", (4095, 0)), ("none", (4095, 4095))])
def test_with_a_window_strips_of_neighbours_are_sent(
    strategy: StrategyName, causal: Any, window: tuple[int, int]
) -> None:
    """A million tokens on 8 ranks; without the window a rank is sent 917,504."""
    problem = replace(LONG, causal=causal, window=window)
    found = received(problem, strategy, 8)
    assert found == needed(problem, strategy, 8)
    assert max(found) <= 2.1 * 4096
    assert max(found) > 0


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
@pytest.mark.parametrize("window", [(-1, -1), (1000, 0)])
def test_of_documents_only_what_is_shared_is_sent(
    strategy: StrategyName, window: tuple[int, int]
) -> None:
    starts = np.random.default_rng(5).choice(np.arange(1, 1 << 18), 63, replace=False)
    segments = (0, *map(int, sorted(starts)))
    problem = replace(
        LONG, q_tokens=1 << 18, kv_tokens=1 << 18, causal="upper_left", window=window,
        segments=segments,
    )  # fmt: skip
    found = received(problem, strategy, 8)
    assert found == needed(problem, strategy, 8)
    assert sum(found) < 0.1 * 7 * problem.kv_tokens  # of what a ring without documents sends
    assert max(found) > 0


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_of_what_a_causal_ring_sent_whole_a_quarter_stays_at_home(ranks: int) -> None:
    """Rank 0 sees both chunks of every other rank, the last one only the early chunks."""
    chunk = 512
    tokens = 2 * ranks * chunk
    problem = replace(LONG, q_tokens=tokens, kv_tokens=tokens, causal="lower_right")
    found = received(problem, "ring", ranks)
    assert found == needed(problem, "ring", ranks)
    assert found == [chunk * (2 * (ranks - 1) - rank) for rank in range(ranks)]
    assert 4 * sum(found) == 3 * (ranks - 1) * tokens


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(32, 300), ranks=st.integers(1, 16), shares=st.sampled_from(SHARES))
def test_nothing_that_no_query_sees_is_sent_under_a_causal_mask(
    tokens: int, ranks: int, shares: Callable[[int, int], Any]
) -> None:
    problem = replace(LONG, q_tokens=tokens, kv_tokens=tokens, causal="upper_left")
    owners = Partition(shares(tokens, ranks), shares(tokens, ranks))
    assert received(problem, "ring", ranks, owners) == needed(problem, "ring", ranks, owners)


@settings(max_examples=60, deadline=None)
@given(problem=problems(max_tokens=300), ranks=st.integers(1, 16))
def test_nothing_that_no_query_sees_is_sent_where_a_mask_hides_keys(
    problem: AttentionProblem, ranks: int
) -> None:
    problem = replace(problem, causal="upper_left", window=(13, 0), kv_tokens=problem.q_tokens)
    for strategy in ("ring", "allgather"):
        assert received(problem, strategy, ranks) == needed(problem, strategy, ranks)  # type: ignore[arg-type]
