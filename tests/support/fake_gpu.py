"""A double of the CUDA driver and cuDNN at their seams, with all ranks in one process.

Streams are queues of work that is done late and in an order drawn at random, as far as events and
flags allow; so are the graphs that they are captured into. Memory that is given out, received into
or freed is poisoned. So what a device forgets to wait for comes out as a wrong result.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mdattn_mpi.devices.cuda.attention import ONE, AttentionCall
from mdattn_mpi.devices.cuda.dlpack import Borrowed
from mdattn_mpi.devices.cuda.gpu import Gpu, View
from mdattn_mpi.devices.cuda.merge import MergeCall
from mdattn_mpi.errors import DeviceError, RejectedError

DEADLINE = 30.0
POISON = 0x7FC0
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


class Machine:
    """All GPUs of all ranks: one lock, one random order."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.replays: list[Replay] = []
        self.memory: dict[int, Any] = {}  # address -> buffer

    def step(self) -> bool:
        """Do one piece of work of a stream drawn at random; False where none can go on."""
        with self.lock:
            busy: list[Stream | Replay] = [stream for stream in self.streams if stream.queue]
            busy += self.replays
            self.random.shuffle(busy)
            return any(each.step() for each in busy)

    def until(self, condition: Callable[[], bool]) -> None:
        """Work until `condition`, which other ranks may bring about."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if not self.step():
                assert time.monotonic() < deadline, "the streams wait for each other"
                time.sleep(1e-3)


class Event:
    """Done once its place in the stream has been reached."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.done = False
        self.time = 0.0
        self.capture: Capture | None = None
        self.nodes: frozenset[int] = frozenset()

    @property
    def is_done(self) -> bool:
        assert self.capture is None, "a captured event is asked for"
        if self.machine.random.random() < 0.3:
            self.machine.step()
        return self.done

    def sync(self) -> None:
        assert self.capture is None, "a captured event is waited for"
        self.machine.until(lambda: self.done)

    def __sub__(self, other: Event) -> float:
        assert self.done
        assert other.done
        return (self.time - other.time) * 1e3


class Stream:
    """Work in order."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.queue: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()
        self.handle = len(machine.streams)
        self.capture: Capture | None = None
        self.last: frozenset[int] = frozenset()  # the nodes that the next one comes after
        machine.streams.append(self)

    def push(self, act: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        with self.machine.lock:
            if self.capture is None:
                self.queue.append((ready, act))
            else:
                self.capture.nodes.append(Node(ready, act, self.last))
                self.last = frozenset([len(self.capture.nodes) - 1])

    def step(self) -> bool:
        """Do the next piece of work, if it can be done."""
        ready, act = self.queue[0]
        if ready():
            self.queue.popleft()
            act()
            return True
        return False


class Node(NamedTuple):
    """A piece of captured work, and the nodes that it comes after."""

    ready: Callable[[], bool]
    act: Callable[[], object]
    after: frozenset[int]


class Capture:
    """What streams were given that began with one of them."""

    def __init__(self, origin: Stream) -> None:
        self.origin = origin
        self.streams = [origin]
        self.nodes: list[Node] = []
        self.open = True

    def end(self) -> list[Node]:
        """Return the nodes; all streams must have joined the first."""
        self.open = False
        joined: set[int] = set()
        found = set(self.origin.last)
        while found:
            joined |= found
            found = {node for each in found for node in self.nodes[each].after} - joined
        for stream in self.streams:
            assert stream.last <= joined, "a captured stream isn't joined"
            stream.capture, stream.last = None, frozenset()
        return self.nodes


class Replay:
    """A launched graph: any order of nodes that their edges allow."""

    def __init__(self, machine: Machine, nodes: list[Node]) -> None:
        self.machine, self.nodes = machine, nodes
        self.left = set(range(len(nodes)))

    def step(self) -> bool:
        """Do a node that can be done, if there is one."""
        free = [number for number in self.left if not self.nodes[number].after & self.left]
        self.machine.random.shuffle(free)
        for number in free:
            if self.nodes[number].ready():
                self.left.remove(number)
                self.nodes[number].act()
                return True
        return False


class FakeGpu:
    """What `driver.Gpu` is, on host memory."""

    sm = (9, 0)
    multiprocessors = 132
    name = "Double"
    driver, driver_major, library_major = "13.0", 13, 13
    total_bytes = free_bytes = 1 << 30

    def __init__(self, machine: Machine, ordinal: int = 0, capacity: int = 1 << 30) -> None:
        self.machine = machine
        self.ordinal = ordinal
        self.pci_bus_id = f"0000:0{ordinal}:00.0"
        self.capacity = capacity
        self.opened: set[int] = set()
        self.pinned_now: dict[int, Any] = {}

    def use(self) -> None:
        pass

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.capacity:
            return 0
        self.capacity -= nbytes
        buffer = np.full(nbytes // 2 + 1, POISON, np.uint16)
        self.machine.memory[buffer.ctypes.data] = buffer
        return int(buffer.ctypes.data)

    def release(self, address: int) -> None:
        del self.machine.memory[address]

    def available(self) -> int:
        return self.capacity

    def pinned(self, nbytes: int) -> int:
        buffer = np.full(nbytes, 0xA5, np.uint8)
        self.pinned_now[buffer.ctypes.data] = buffer
        return int(buffer.ctypes.data)

    def release_pinned(self, address: int) -> None:
        del self.pinned_now[address]

    def stream(self, urgency: int = 0) -> Stream:
        return Stream(self.machine)

    def record(self, stream: Stream, *, timed: bool = False) -> Event:
        event = Event(self.machine)
        if stream.capture is not None:
            event.capture, event.nodes = stream.capture, stream.last
            return event

        def reach() -> None:
            event.done, event.time = True, time.monotonic()

        stream.push(reach)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        if event.capture is None:
            assert stream.capture is None, "a captured stream waits for what isn't captured"
            stream.push(lambda: None, lambda: event.done)
            return
        assert event.capture.open, "a stream waits for what was captured before"
        if stream.capture is None:
            stream.capture = event.capture
            stream.capture.streams.append(stream)
        assert stream.capture is event.capture, "a stream waits for another capture"
        stream.last |= event.nodes

    def synchronize(self) -> None:
        self.machine.until(lambda: not any(stream.queue for stream in self.machine.streams))

    def begin_capture(self, stream: Stream) -> None:
        assert stream.capture is None
        stream.capture = Capture(stream)

    def end_capture(self, stream: Stream) -> list[Node]:
        if stream.capture is None or stream.capture.origin is not stream:
            raise DeviceError("no capture has begun with this stream")
        return stream.capture.end()

    def launch(self, graph: list[Node], stream: Stream) -> None:
        assert stream.capture is None
        replay = Replay(self.machine, graph)

        def begin() -> None:
            self.machine.replays.append(replay)

        def end() -> None:
            self.machine.replays.remove(replay)

        stream.push(begin)
        stream.push(end, lambda: not replay.left)

    def destroy(self, graph: list[Node]) -> None:
        graph.clear()

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        stream.push(lambda: ctypes.memmove(target, source, nbytes))

    def copy_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, run: int, rows: int, on: Any
    ) -> None:
        def act() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * pitch, source + row * source_pitch, run)

        on.push(act)

    def fill(self, target: int, value: int, words: int, stream: Stream) -> None:
        stream.push(lambda: _view(target, (words,), (1,), np.uint32).fill(value))

    def raise_flag(self, address: int, value: int, stream: Stream) -> None:
        stream.push(lambda: _view(address, (1,), (1,), np.uint32).fill(value))

    def await_flag(self, address: int, value: int, stream: Stream) -> None:
        flag = ctypes.c_uint32.from_address(address)
        stream.push(lambda: None, lambda: flag.value >= value)

    def take_flag(self, address: int, stream: Stream) -> None:
        flag = ctypes.c_uint32.from_address(address)
        stream.push(lambda: setattr(flag, "value", 0), lambda: flag.value == 1)

    def reaches(self, pci_bus_id: str) -> bool:
        return True

    def ipc_handle(self, address: int) -> bytes:
        return np.array([address] + [0] * 7, np.int64).tobytes()

    def open(self, handle: bytes) -> int:
        address = int(np.frombuffer(handle, np.int64)[0])
        self.opened.add(address)
        return address

    def close(self, address: int) -> None:
        assert address in self.machine.memory, "freed while another rank had it open"
        self.opened.remove(address)

    def merge(self, call: MergeCall, stream: Stream) -> None:
        stream.push(lambda: _merge(call))

    def adopt(self, handle: int) -> Stream:
        return self.machine.streams[handle]

    def view(self, array: Any, stream: Stream | None) -> View:
        if isinstance(array, Borrowed):
            assert stream is None, "its stream is known"
            return View(array.address, array.shape, array.strides, array.dtype, array)
        found: View = array.view(stream)
        return found


_as_checked: type[Gpu] = FakeGpu  # by mypy


class FakeLaunch(NamedTuple):
    """What an `attention.Launch` is, in float64 until the output is rounded."""

    call: AttentionCall
    workspace: int = 256

    def run(self, addresses: Sequence[int], workspace: int, stream: Stream) -> None:
        stream.push(lambda: _attend(self.call, addresses))


class FakeEngine:
    """What an `attention.Engine` is: head dims are multiples of 8, cuDNN has no float32 output."""

    version = "double"

    def __init__(self, name: str) -> None:
        self.name = name
        self.preparing = 0.04 if name == "cudnn" else 0.0
        self.prepared: list[AttentionCall] = []
        self.open = True

    def refusal(self, call: AttentionCall) -> str:
        if call.head_dim % 8:
            return "hidden_dim should be multiple of 8"
        if self.name != "cudnn":
            return ""
        if call.softcap:
            return "it has no soft cap"
        if call.documents != ONE:
            return "it takes one document a call"
        if call.mask == "band" and call.q_tokens > call.kv_tokens:
            return "a band of more rows than keys"
        return "its output has 16 bits" if call.out_dtype != call.dtype else ""

    def prepare(self, call: AttentionCall) -> FakeLaunch:
        assert self.open
        if self.refusal(call):
            raise RejectedError(self.refusal(call))
        self.prepared.append(call)
        return FakeLaunch(call)

    def close(self) -> None:
        self.open = False


class FakeLibraries:
    """What `devices.cuda.Libraries` is."""

    def __init__(self, machine: Machine, gpus: int, **wrong: Any) -> None:
        self.machine = machine
        self.gpus = gpus
        self.wrong = wrong

    def count(self) -> int:
        return self.gpus

    def why_not(self) -> str:
        return str(self.wrong.get("missing", ""))

    def gpu(self, ordinal: int) -> FakeGpu:
        gpu = FakeGpu(self.machine, ordinal)
        for name, value in self.wrong.items():
            setattr(gpu, name, value)
        return gpu

    def cudnn(self, gpu: FakeGpu) -> FakeEngine:
        return FakeEngine("cudnn")

    def why_no_flash(self, sm: tuple[int, int]) -> str:
        answer = self.wrong.get("no_flash", "")
        return answer if isinstance(answer, str) else str(next(answer))

    def flash(self, gpu: FakeGpu) -> FakeEngine:
        return FakeEngine("flash")

    def nccl(self, group: Any) -> Any:
        from tests.support.fake_nccl import FakeNccl

        return FakeNccl(self.machine, group)


def _view(address: int, shape: Sequence[int], strides: Sequence[int], dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    buffer = (ctypes.c_ubyte * (extent * dtype.itemsize)).from_address(address)
    flat = np.frombuffer(buffer, np.uint8).view(dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides])


def _attend(call: AttentionCall, addresses: Sequence[int]) -> None:
    if call.documents == ONE:
        _attend_once(call, addresses)
        return
    starts = [
        _view(address, (len(numbers),), (1,), np.int32).tolist()
        for address, numbers in zip(addresses[5:], call.documents, strict=True)
    ]
    for (first, last), (begin, end) in zip(*map(pairwise, starts), strict=True):
        one = call._replace(q_tokens=last - first, kv_tokens=end - begin, documents=ONE)
        rows = (first, begin, begin, first, first)
        strides = (call.q, call.k, call.v, call.output, call.lse)
        sizes = [DTYPES[t].itemsize for t in (*[call.dtype] * 3, call.out_dtype, "float32")]
        steps = (row * s[0] * size for row, s, size in zip(rows, strides, sizes, strict=True))
        _attend_once(one, [at + step for at, step in zip(addresses, steps, strict=False)])


def _attend_once(key: AttentionCall, addresses: Sequence[int]) -> None:
    dtype = DTYPES[key.dtype]
    sq, skv, nq, nkv = key.q_tokens, key.kv_tokens, key.q_heads, key.kv_heads
    q = _view(addresses[0], (sq, nq, key.head_dim), key.q, dtype).astype(np.float64)
    k = _view(addresses[1], (skv, nkv, key.head_dim), key.k, dtype).astype(np.float64)
    v = _view(addresses[2], (skv, nkv, key.v_head_dim), key.v, dtype).astype(np.float64)
    out = _view(addresses[3], (sq, nq, key.v_head_dim), key.output, DTYPES[key.out_dtype])
    lse = _view(addresses[4], (sq, nq), key.lse, np.float32)
    k, v = (np.repeat(array, nq // nkv, axis=1) for array in (k, v))
    scores = np.einsum("qnh,knh->nqk", q, k) * key.scale
    if key.softcap:
        scores = key.softcap * np.tanh(scores / key.softcap)
    after = np.arange(skv)[None] - np.arange(sq)[:, None] - (skv - sq)  # of the diagonal
    if key.band.after is not None:
        scores[:, after > key.band.after] = -np.inf
    if key.band.before is not None:
        scores[:, after < -key.band.before] = -np.inf
    most = scores.max(axis=2, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(most), 0, most))
    total = weights.sum(axis=2, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    out[...] = np.einsum("nqk,knh->qnh", weights, v).astype(out.dtype)
    with np.errstate(divide="ignore"):
        lse[...] = (most + np.log(total))[..., 0].T.astype(np.float32)


def _merge(call: MergeCall) -> None:
    heads, dim, rows = call.heads, call.dim, range(call.start, call.stop)
    logs: list[Any] = []
    values: list[Any] = []
    parts = [(p.output, p.lse, p.start, p.stop, DTYPES[call.kind]) for p in call.parts]
    if call.running:
        parts.append((call.running, call.running_lse, 0, call.stop, DTYPES["float32"]))
    for output, lse, start, stop, dtype in parts:
        value = np.zeros((len(rows), heads, dim))
        log = np.full((len(rows), heads), -np.inf)
        for index, row in enumerate(rows):
            if start <= row < stop:
                at = (row - start) * heads
                bytes_before = at * dim * dtype.itemsize
                value[index] = _view(output + bytes_before, (heads, dim), (dim, 1), dtype)
                log[index] = _view(lse + at * 4, (heads,), (1,), np.float32)
        values.append(value)
        logs.append(log)
    if call.sinks:
        values.append(np.zeros((len(rows), heads, dim)))
        logs.append(np.tile(_view(call.sinks, (heads,), (1,), np.float32), (len(rows), 1)))
    target = DTYPES[call.target]
    at = call.start * heads
    out = _view(
        call.output + at * dim * target.itemsize,
        (len(rows), heads, dim),
        (heads * dim, dim, 1),
        target,
    )
    lse = _view(call.lse + at * 4, (len(rows), heads), (heads, 1), np.float32)
    if not logs:
        out[...], lse[...] = 0, -np.inf
        return
    most = np.maximum.reduce(logs)
    safe = np.where(np.isinf(most), 0, most)
    weights = [np.exp(log - safe) for log in logs]
    total = sum(weights)
    alive = total > 0
    merged = sum(
        np.where((w > 0)[..., None], w[..., None] * v, 0)
        for w, v in zip(weights, values, strict=True)
    )
    out[...] = (merged / np.where(alive, total, 1)[..., None]).astype(target)
    with np.errstate(divide="ignore"):
        lse[...] = np.where(alive, safe + np.log(np.where(alive, total, 1)), -np.inf)
