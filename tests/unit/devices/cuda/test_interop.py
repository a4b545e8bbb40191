"""Arrays of other libraries, at every boundary: nobody waits, and all is right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.interop import Exported, HiddenCaller, StreamCaller, _Latest
from mdattn_mpi.devices.cuda.memory import Memory
from mdattn_mpi.devices.cuda.order import Queue
from mdattn_mpi.problem import AttentionProblem, Partition, Plan, Span, StrategyName
from mdattn_mpi.strategies import STRATEGIES
from tests.support.fake_caller import Caller, Tensor, known
from tests.support.fake_gpu import Machine, Stream
from tests.support.reference import TOLERANCE, attention, random_inputs
from tests.unit.devices.cuda.test_device import NAMES, in_group

Array = NDArray[Any]
CALLS = 5
# How many tokens each rank has; one has none.
SHARES = {2: (7, 6), 3: (5, 0, 8)}


def owners(ranks: int) -> tuple[tuple[Span], ...]:
    ends = np.cumsum((0, *SHARES[ranks])).tolist()
    return tuple((Span(start, stop),) for start, stop in pairwise(ends))


def call(device: CudaDevice, plan: Plan, arrays: list[Tensor], moves: Callable[[], None]) -> Any:
    """One call as `library.attention` makes it; the caller waits for nothing.

    `moves` comes between the start and the wait.
    """
    adopted = [device.adopt(array) for array in arrays]
    steps = device.perform(STRATEGIES[plan.strategy], plan, *adopted)
    next(steps)
    try:
        next(steps)
    except StopIteration as end:
        moves()
        out, lse = (device.export(array) for array in end.value)
    for array in arrays:
        array.overwrite()
    del array, adopted, steps
    arrays.clear()  # frees them
    found = out.read(), lse.read()
    out.overwrite()
    return found


def default_stream(caller: Caller, number: int) -> None:
    """All calls in one stream."""


def a_stream_a_call(caller: Caller, number: int) -> None:
    """What the caller does next it does in another stream, and nothing ties the two."""
    caller.current = Stream(caller.machine)


def a_side_stream(caller: Caller, number: int) -> None:
    """Calls in two streams in turn."""
    caller.current = caller.machine.streams[caller.sides[number % 2]]


def move(caller: Caller) -> None:
    """Go on in another stream."""
    caller.current = Stream(caller.machine)


PATTERNS = (default_stream, a_side_stream, a_stream_a_call)


def attend(
    strategy: StrategyName,
    ranks: int,
    seed: int,
    *,
    pattern: Callable[[Caller, int], None] = default_stream,
    hides: bool = False,
    stride: int = 1,
    transfer: str = "copy",
    moves: bool = False,
    replays: bool = True,
) -> bool:
    """Call again and again on all ranks; tell whether all results are right."""
    machine = Machine(seed)
    tokens = sum(SHARES[ranks])
    problem = AttentionProblem(tokens, tokens, 4, 2, 8, 16, "float16", "upper_left")
    spans = owners(ranks)
    plan = Plan(problem, strategy, ranks, partition=Partition(query=spans, kv=spans))
    inputs = [random_inputs(problem, seed + number) for number in range(CALLS)]
    callers = {rank: Caller(machine, hides) for rank in range(ranks)}

    def act(device: CudaDevice) -> Any:
        caller, rows = callers[device.rank], spans[device.rank][0].slice

        def produce(arrays: Any) -> list[Tensor]:
            return [caller.array(array[rows], stride) for array in arrays]

        # Those of a library that hides its streams are there before: nothing else ties the calls.
        early = [produce(arrays) for arrays in inputs] if hides else []
        found = []
        for number, arrays in enumerate(inputs):
            pattern(caller, number)
            given = early.pop(0) if hides else produce(arrays)
            found.append(call(device, plan, given, lambda: move(caller) if moves else None))
        return found

    with known(callers):
        results = in_group(ranks, act, machine=machine, transfer=transfer, replays=replays)
    right = True
    for number, arrays in enumerate(inputs):
        out, lse = (np.concatenate([shard[number][i] for shard in results]) for i in (0, 1))
        right_out, right_lse = attention(problem, *arrays)
        bound = 2 * TOLERANCE["float16"] * (1 + np.abs(right_out))
        right &= bool((np.abs(out - right_out) <= bound).all())
        right &= bool(np.allclose(lse, right_lse, rtol=1e-4, atol=1e-4))
    return right


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_caller_waits_for_nothing(
    pattern: Callable[[Caller, int], None], strategy: StrategyName, ranks: int
) -> None:
    for seed in range(2):
        assert attend(strategy, ranks, seed, pattern=pattern)
        assert attend(strategy, ranks, seed, pattern=pattern, replays=False)


@pytest.mark.parametrize("strategy", NAMES)
def test_a_caller_that_waits_in_another_stream_than_it_started_in(strategy: StrategyName) -> None:
    for seed in range(4):
        assert attend(strategy, 2, seed, moves=True)


@pytest.mark.parametrize("strategy", NAMES)
def test_strided_arrays_are_copied_in_time(strategy: StrategyName) -> None:
    for seed in range(2):
        assert attend(strategy, 2, seed, stride=3)


@pytest.mark.parametrize("strategy", NAMES)
def test_a_caller_waits_for_nothing_where_nccl_carries(strategy: StrategyName) -> None:
    for seed in range(2):
        assert attend(strategy, 3, seed, pattern=a_side_stream, transfer="nccl")


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("strategy", NAMES)
def test_a_library_without_streams(strategy: StrategyName, ranks: int) -> None:
    for seed in range(2):
        assert attend(strategy, ranks, seed, hides=True)


def without_fence(memory: Memory, nbytes: int, cut: Any = Memory.cut, **options: Any) -> Any:
    return cut(memory, nbytes, **options)[0], {}


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize(
    ("what", "names", "instead", "hides"),
    [
        (Queue, "advance", lambda queue: {}, False),  # what comes in is still being written
        (StreamCaller, "give_back", lambda *args: True, False),  # ... is overwritten, or freed
        (StreamCaller, "wait give_back", lambda *args: True, False),  # what goes out is read
        (Memory, "cut", without_fence, False),  # ... is freed, and its memory taken again
        (HiddenCaller, "give_back", lambda *args: None, True),
        (Exported, "_tell", lambda *args: None, True),
        (_Latest, "mark", Queue.mark, True),
    ],
)
def test_each_rule_is_needed(
    monkeypatch: pytest.MonkeyPatch,
    what: type,
    names: str,
    instead: Any,
    hides: bool,
    replays: bool,
) -> None:
    if what is StreamCaller and names == "give_back" and replays:
        pytest.skip("the caller waits for the output, whose end is that of the whole replay")
    if what is Memory and replays:
        pytest.skip("flags lie in such memory too: the ranks wait for each other instead")
    for name in names.split():
        monkeypatch.setattr(what, name, instead)
    pattern = default_stream if hides else a_stream_a_call
    options: dict[str, Any] = {"pattern": pattern, "hides": hides, "replays": replays}
    assert not all(attend("ring", 2, seed, **options) for seed in range(20))


def test_other_libraries_wait_for_what_they_say() -> None:
    machine = Machine(3)
    caller = Caller(machine)
    plan = Plan(AttentionProblem(13, 13, 4, 2, 8, 16, "float16"), "ring", 1)
    inputs = random_inputs(plan.problem, 1)

    def act(device: CudaDevice) -> Any:
        caller.current.push(lambda: None)
        adopted = [device.adopt(caller.array(array)) for array in inputs]
        steps = STRATEGIES["ring"](device, plan, *adopted)
        next(steps)
        try:
            next(steps)
        except StopIteration as end:
            exported = device.export(end.value[0])
        return caller.from_dlpack(exported).read()

    found = in_group(1, act, machine=machine)[0]  # no library of that name is known
    right, _ = attention(plan.problem, *inputs)
    assert (np.abs(found - right) <= 2 * TOLERANCE["float16"] * (1 + np.abs(right))).all()


def test_a_head_major_array_is_copied_in_runs() -> None:
    machine = Machine(0)
    values = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float16)
    caller = Caller(machine)
    callers = {0: caller}

    def act(device: CudaDevice) -> Any:
        tensor = caller.array(values)
        tensor.memory = tensor.memory.transpose(1, 0, 2)
        tensor.shape = tensor.memory.shape
        return device.download(device.adopt(tensor)).wait()[0]

    with known(callers):
        found = in_group(1, act, machine=machine)[0]
    assert (found == values.transpose(1, 0, 2)).all()
