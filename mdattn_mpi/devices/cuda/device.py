"""One GPU a rank: cuDNN attends, copy engines or NCCL carry, one kernel merges in float32.

Attention calls run in several streams, called lanes, each less urgent than the one before it: a
call fills the multiprocessors that the end of the call before it leaves idle, and no others. Copies
have streams of their own and are tied to kernels by events alone, so a batch moves item i+1 to the
GPU and between GPUs while item i computes and item i-1 goes back to the host. The host never waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.copies import Copies
from mdattn_mpi.devices.cuda.cudnn import PlanKey
from mdattn_mpi.devices.cuda.memory import (
    DeviceArray,
    Fence,
    HostBuffers,
    Memory,
    Storage,
    contiguous_strides,
    pending,
)
from mdattn_mpi.devices.cuda.merge import PARTS, MergeCall, Part
from mdattn_mpi.devices.protocol import Message
from mdattn_mpi.estimate import Costs, gpu_costs, head_start
from mdattn_mpi.problem import AttentionProblem, Span

LANES = 4
MAIN = 0  # where everything begins and ends
FLOAT32 = np.dtype(np.float32)
SAMPLE = 1024  # tokens of the problem that `check` tries
WORKSPACE = 1 << 20


@dataclass(eq=False)
class Launched:
    """An attention call, and where its result lies."""

    rows: Span
    lane: int
    end: Any
    output: DeviceArray
    lse: DeviceArray


@dataclass(eq=False)
class Partials:
    """The partial results of one query shard.

    The first result for a row goes straight to where the output will be; where no other comes,
    nothing is left to do. Further ones get memory of their own and are merged at the end.
    """

    q: DeviceArray
    scale: float
    output: DeviceArray
    lse: DeviceArray
    start: Any
    first: list[Launched] = field(default_factory=list)
    more: list[Launched] = field(default_factory=list)
    running: tuple[DeviceArray, DeviceArray] | None = None  # float32, of all rows

    def covers(self, rows: Span) -> bool:
        """Whether any of `rows` has a result already."""
        return self.running is not None or any(_overlap(rows, call.rows) for call in self.first)


class Transfer(NamedTuple):
    """Messages under way; keeps their arrays."""

    received: list[DeviceArray]
    kept: list[DeviceArray]
    sent: list[DeviceArray]
    copies: Copies | None
    ends: list[Any]


@dataclass(eq=False)
class Download:
    """Arrays on their way to the host."""

    arrays: tuple[NDArray[Any], ...]
    end: Any

    def wait(self) -> tuple[NDArray[Any], ...]:
        """Return the arrays once they are there; any thread may call."""
        self.end.sync()
        return self.arrays


class CudaDevice:
    """One rank's GPU in a group.

    Parameters
    ----------
    rank, ranks
        This rank's number in the group, and the group's size.
    gpu, sdpa
        The driver and the attention of this rank's GPU.
    copies, nccl
        The way to the ranks in `near`, and to all others; None where no rank needs it.
    near
        The ranks that copy engines reach.
    memory
        Device memory; shared with `copies`.
    facts
        What `describe` says besides.
    limit
        Bytes of GPU memory that every rank of the group has.
    timings
        Whether `seconds` is wanted: it costs a lone short item some microseconds.

    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        gpu: Any,
        sdpa: Any,
        *,
        memory: Memory,
        copies: Any = None,
        nccl: Any = None,
        near: Iterable[int] = (),
        facts: Mapping[str, str] | None = None,
        limit: int = 0,
        timings: bool = True,
    ) -> None:
        self._rank, self._ranks = rank, ranks
        self._gpu, self._sdpa = gpu, sdpa
        self._copies, self._nccl, self._near = copies, nccl, frozenset(near)
        self.memory = memory
        self.host = HostBuffers(gpu)
        self._facts, self._limit = dict(facts or {}), limit
        self._lanes = tuple(gpu.stream(LANES - lane) for lane in range(LANES))
        self._apart: set[int] = set()  # lanes that MAIN doesn't wait for yet
        self._begin: Any = None  # what lanes come after that join in
        self._seen: list[Any] = []  # what MAIN has waited for besides
        self._upwards, self._downwards = gpu.stream(), gpu.stream()
        self._within, self._net = gpu.stream(), gpu.stream(LANES + 1)
        self._tails: Fence | None = None
        self._next_lane = MAIN
        self._workspaces: dict[int, DeviceArray] = {}
        self._uploading: deque[tuple[Any, NDArray[Any]]] = deque()
        self._clock = _Clock(gpu, timings)
        self._giver: type = object
        self._owed: list[Any] = []  # ends of copies that read other libraries' arrays
        self._open = True

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self._rank

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return self._ranks

    # -- arrays ------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], like: DeviceArray) -> DeviceArray:
        """An array with undefined contents, of the dtype of `like`."""
        return self._empty(shape, like.dtype)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy `source` into `target`; same shape, any strides."""
        if source.size:
            self._use(source, target)
            self._join()
            self._copy(source, target, self._lanes[MAIN])
            self._wrote(target)
            self._begin = None

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in pinned memory: `upload` takes it while the host goes on."""
        return self.host.empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """Take an array from the host; from `host` it goes while the host goes on."""
        source = np.ascontiguousarray(array)
        target = self._empty(source.shape, source.dtype)
        if not source.size:
            return target
        for event in pending(target.storage.fence):
            self._gpu.wait(self._upwards, event)
        self._gpu.copy(target.address, source.ctypes.data, source.nbytes, self._upwards)
        end = self._gpu.record(self._upwards)
        target.storage.arrive(end)
        while self._uploading and self._uploading[0][0].is_done:
            self._uploading.popleft()
        self._uploading.append((end, source))
        return target

    def download(self, *arrays: DeviceArray) -> Download:
        """Start bringing arrays to the host."""
        found = tuple(self.host.empty(array.shape, array.dtype) for array in arrays)
        for event in pending([event for array in arrays for event in self._readable(array)]):
            self._gpu.wait(self._downwards, event)
        for array, target in zip(arrays, found, strict=True):
            if array.size:
                self._gpu.copy(target.ctypes.data, array.address, array.nbytes, self._downwards)
        end = self._gpu.record(self._downwards)
        for array in arrays:
            array.storage.busy.append(end)
        return Download(found, end)

    def adopt(self, array: Any, *, ready: bool = False) -> DeviceArray:
        """Take an array of another library on this GPU, by DLPack; copied only if it is strided.

        Messages of a `ready` array don't wait for kernels: nothing is writing it any more.
        """
        address, shape, strides, dtype = self._gpu.view(array, self._lanes[MAIN])
        storage = Storage(address, owner=array)
        storage.by_kernels = not ready
        self._giver = type(array)
        adopted = DeviceArray(storage, shape, dtype, strides)
        if adopted.is_contiguous:
            return adopted
        own = self._empty(shape, dtype)  # messages are contiguous
        self.copy(adopted, own)
        return own

    def hand_over(self, array: DeviceArray) -> Any:
        """Give an array to the library that `adopt` was last given one of; nothing is copied."""
        exported = self._gpu.exported(array, lambda: self._readable(array))
        return importer(self._giver)(exported)

    def mark(self) -> Any:
        """Record all kernels so far; marks give milliseconds by ``-`` once they are past."""
        self._join()
        return self._gpu.record(self._lanes[MAIN], timed=True)

    # -- messages ----------------------------------------------------------------------------------

    def exchange(self, send: Sequence[Message], receive: Sequence[Message]) -> Transfer:
        """Collective. Start sending and receiving; return once the hosts have spoken."""
        away, coming = _by_peer(send), _by_peer(receive)
        own, kept = away.pop(self._rank, []), coming.pop(self._rank, [])
        received = [array for arrays in coming.values() for array in arrays]
        sent = [array for arrays in away.values() for array in arrays]
        copies, ends = None, []
        if own:
            ends.append(self._keep(own, kept))
        near_out, far_out = self._split(away)
        near_in, far_in = self._split(coming)
        if near_out or near_in:
            copies = self._copies.exchange(near_out, near_in, self._readable, self._writable)
        if far_out or far_in:
            ends.append(self._exchange_far(far_out, far_in))
        leaving = (*ends, *(copies.sent if copies else ()))
        for array in (*own, *sent):
            array.storage.busy += leaving
            if array.storage.place is None:
                self._owed += leaving
        for array in (*kept, *received):
            # What it held is gone; nothing may read it before `wait` says when.
            storage = array.storage
            storage.written, storage.unseen = [], []
            storage.by_kernels = False
            storage.busy += ends
        return Transfer(received, kept, sent + own, copies, ends)

    def wait(self, transfer: Transfer) -> None:
        """Let everything that follows see what `transfer` received."""
        ends = list(transfer.ends)
        if transfer.copies and transfer.copies.expected:
            ends.append(self._copies.arrival(transfer.copies))
        if transfer.received and ends and self._clock.runs:
            self._clock.waited(self._record_tails(timed=True), ends[-1])
        for array in (*transfer.kept, *transfer.received):
            for end in ends:
                array.storage.arrive(end)

    def _keep(self, sources: list[DeviceArray], targets: list[DeviceArray]) -> Any:
        """Copy a message to the rank itself."""
        arrays = zip(sources, targets, strict=True)
        ready = [event for array in sources for event in self._readable(array)]
        ready += [event for array in targets for event in self._writable(array)]
        for event in pending(ready):
            self._gpu.wait(self._within, event)
        for source, target in arrays:
            self._copy(source, target, self._within)
        return self._gpu.record(self._within, timed=True)

    def _exchange_far(
        self, send: dict[int, list[DeviceArray]], receive: dict[int, list[DeviceArray]]
    ) -> Any:
        ready = [e for arrays in send.values() for a in arrays for e in self._readable(a)]
        ready += [e for arrays in receive.values() for a in arrays for e in self._writable(a)]
        for event in pending(ready):
            self._gpu.wait(self._net, event)
        self._nccl.exchange(_spans(send), _spans(receive), int(self._net.handle))
        return self._gpu.record(self._net, timed=True)

    def _split(
        self, messages: dict[int, list[DeviceArray]]
    ) -> tuple[dict[int, list[DeviceArray]], dict[int, list[DeviceArray]]]:
        near = {peer: arrays for peer, arrays in messages.items() if peer in self._near}
        return near, {peer: arrays for peer, arrays in messages.items() if peer not in near}

    # -- attention ---------------------------------------------------------------------------------

    def accumulator(self, q: DeviceArray, v_head_dim: int, scale: float) -> Partials:
        """Start with nothing seen: output 0, LSE −∞, for each row and head of `q`."""
        rows, heads = q.shape[:2]
        output = self._empty((rows, heads, v_head_dim), q.dtype)
        lse = self._empty((rows, heads), FLOAT32)
        self._use(q, output, lse)
        self._join()
        self._next_lane = MAIN
        return Partials(q, scale, output, lse, self._clock.time(self._lanes[MAIN]))

    def attend(
        self, accumulator: Partials, rows: Span, k: DeviceArray, v: DeviceArray, causal: bool
    ) -> None:
        """Add the attention of the query's `rows` to all of `k` and `v`."""
        if not (len(rows) and k.size and v.size and accumulator.q.size):
            return
        first = not accumulator.covers(rows)
        if not first and len(accumulator.first) + len(accumulator.more) >= PARTS:
            self._fold(accumulator)
        if first:
            output, lse = accumulator.output[rows.slice], accumulator.lse[rows.slice]
        else:
            output = self._empty((len(rows), *accumulator.output.shape[1:]), accumulator.q.dtype)
            lse = self._empty((len(rows), accumulator.lse.shape[1]), FLOAT32)
        lane, self._next_lane = self._next_lane, (self._next_lane + 1) % LANES
        self._use(k, v, output, lse)
        self._enter(lane)
        self._launch(accumulator, rows, k, v, causal, output, lse, lane)
        call = Launched(rows, lane, self._gpu.record(self._lanes[lane]), output, lse)
        (accumulator.first if first else accumulator.more).append(call)
        self._wrote(output, lse)

    def finish(self, accumulator: Partials) -> tuple[DeviceArray, DeviceArray]:
        """Merge what has more than one result, in float32, rounded once."""
        output, lse = accumulator.output, accumulator.lse
        if output.size:
            alone = [
                call.rows
                for call in accumulator.first
                if not any(_overlap(call.rows, other.rows) for other in accumulator.more)
            ]
            for rows in complement(() if accumulator.running else alone, output.shape[0]):
                self._merge(accumulator, rows, output, lse)
        self._join()
        for event in pending(self._owed):  # who gave an array may take it back after the output
            self._gpu.wait(self._lanes[MAIN], event)
        self._owed.clear()
        self._wrote(output, lse)
        self._clock.computed(accumulator.start, self._clock.time(self._lanes[MAIN]))
        return output, lse

    def _launch(
        self,
        accumulator: Partials,
        rows: Span,
        k: DeviceArray,
        v: DeviceArray,
        causal: bool,
        output: DeviceArray,
        lse: DeviceArray,
        lane: int,
    ) -> None:
        q = accumulator.q[rows.slice]
        plan = self._sdpa.plan(
            key_of(q, k, v, output.strides, lse.strides, causal, accumulator.scale)
        )
        workspace = self._workspace(lane, plan.workspace)
        addresses = (q.address, k.address, v.address, output.address, lse.address)
        self._sdpa.run(plan, addresses, workspace, self._lanes[lane])

    def _merge(
        self, accumulator: Partials, rows: Span, output: DeviceArray, lse: DeviceArray
    ) -> None:
        """Merge all results of `rows` into `output` and `lse`, before less urgent calls end."""
        calls = [
            call for call in (*accumulator.first, *accumulator.more) if _overlap(rows, call.rows)
        ]
        if len(calls) > PARTS:  # no row has so many: go on piece by piece
            for piece in pieces_of(rows, accumulator.first):
                self._merge(accumulator, piece, output, lse)
            return
        # MAIN, unless it has more to do first: then the lane of the last of these calls.
        others = {
            call.lane for call in (*accumulator.first, *accumulator.more) if call not in calls
        }
        lane = calls[-1].lane if calls and MAIN in others else MAIN
        side = self._lanes[lane]
        for call in calls:
            if call.lane != lane:
                self._gpu.wait(side, call.end)
        start = self._clock.time(side)
        running = accumulator.running
        self._gpu.merge(
            MergeCall(
                kind=name_of(accumulator.q.dtype),
                target=name_of(output.dtype),
                output=output.address,
                lse=lse.address,
                start=rows.start,
                stop=rows.stop,
                heads=output.shape[1],
                dim=output.shape[2],
                parts=[_part(call) for call in calls],
                running=running[0].address if running else 0,
                running_lse=running[1].address if running else 0,
            ),
            side,
        )
        self._clock.merged(start, self._clock.time(side))
        self._tails = None

    def _fold(self, accumulator: Partials) -> None:
        """Merge all results so far into one in float32, to bound memory."""
        rows = Span(0, accumulator.output.shape[0])
        if accumulator.running is None:
            output = self._empty(accumulator.output.shape, FLOAT32)
            lse = self._empty(accumulator.lse.shape, FLOAT32)
            self._use(output, lse)
            self._wrote(output, lse)
        else:
            output, lse = accumulator.running
        self._merge(accumulator, rows, output, lse)
        self._join()
        accumulator.running = output, lse
        accumulator.first, accumulator.more = [], []

    # -- order -------------------------------------------------------------------------------------

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        place, fence = self.memory.take(prod(shape) * dtype.itemsize)
        storage = Storage(self.memory.address(place), place, fence, self._release)
        return DeviceArray(storage, shape, dtype, contiguous_strides(shape))

    def _release(self, storage: Storage) -> None:
        if self._open and storage.place:
            self.memory.give_back(storage.place, self._after_all(storage))

    def _use(self, *arrays: DeviceArray) -> None:
        """Make the kernels that follow wait for what writes these arrays, or used them before."""
        unseen: list[Any] = []
        for array in arrays:
            storage = array.storage
            storage.touched = True
            if storage.unseen:
                unseen += storage.unseen
                storage.unseen = []
        for event in pending(unseen):
            for lane in (MAIN, *self._apart):
                self._gpu.wait(self._lanes[lane], event)
            self._seen.append(event)

    def _wrote(self, *arrays: DeviceArray) -> None:
        self._tails = None
        for array in arrays:
            array.storage.by_kernels = True

    def _enter(self, lane: int) -> None:
        """Let a lane come after all that had been joined, and all that was waited for since."""
        if self._begin is None:  # before MAIN has anything that others would wait for
            self._begin = self._gpu.record(self._lanes[MAIN])
        if lane == MAIN or lane in self._apart:
            return
        for event in (self._begin, *pending(self._seen)):
            self._gpu.wait(self._lanes[lane], event)
        self._apart.add(lane)

    def _join(self) -> None:
        """Let MAIN come after all lanes, and all lanes after it from now on."""
        for lane in self._apart:
            self._gpu.wait(self._lanes[MAIN], self._gpu.record(self._lanes[lane]))
        self._apart.clear()
        self._seen.clear()
        self._begin = self._tails = None

    def _after_kernels(self) -> Fence:
        """Events of all kernels so far."""
        if self._tails is None:
            self._tails = self._record_tails()
        return self._tails

    def _record_tails(self, *, timed: bool = False) -> Fence:
        return tuple(
            [self._gpu.record(self._lanes[lane], timed=timed) for lane in (MAIN, *self._apart)]
        )

    def _readable(self, array: DeviceArray) -> Fence:
        """Events after which an array may be read by a copy."""
        storage = array.storage
        return (*storage.written, *(self._after_kernels() if storage.by_kernels else ()))

    def _writable(self, array: DeviceArray) -> Fence:
        """Events after which an array may be written by a copy."""
        return self._after_all(array.storage)

    def _after_all(self, storage: Storage) -> Fence:
        kernels = self._after_kernels() if storage.touched else ()
        return pending([*storage.fence, *storage.written, *storage.busy, *kernels])

    def _copy(self, source: DeviceArray, target: DeviceArray, stream: Any) -> None:
        if source.is_contiguous and target.is_contiguous:
            self._gpu.copy(target.address, source.address, source.nbytes, stream)
            return
        wide = min(source, target, key=lambda array: array.rows()[1])
        rows, run, _ = wide.rows()
        self._gpu.copy_rows(
            target.address,
            _pitch(target, run),
            source.address,
            _pitch(source, run),
            run,
            rows,
            stream,
        )

    def _workspace(self, lane: int, nbytes: int) -> int:
        if lane not in self._workspaces or self._workspaces[lane].nbytes < nbytes:
            array = self._empty((max(nbytes, WORKSPACE),), np.dtype(np.uint8))
            self._use(array)
            self._workspaces[lane] = array
        return self._workspaces[lane].address

    # -- what it is and what it takes --------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse what cuDNN can't do on this GPU, with the reason."""
        q_tokens, kv_tokens = (min(SAMPLE, n) for n in (problem.q_tokens, problem.kv_tokens))
        self._sdpa.plan(sample_key(problem, q_tokens, max(q_tokens, kv_tokens)))

    def costs(self) -> Costs:
        """Rough figures of this GPU and its links."""
        near = len(self._near) == self._ranks - 1
        memory = int(0.92 * self._limit)
        return gpu_costs(self._gpu.sm[0], self._gpu.multiprocessors, near=near, memory=memory)

    def head_start(self, problem: AttentionProblem) -> int:
        """Query rows that may attend to the rank's own keys while the others are gathered."""
        return head_start(problem, self._ranks, self.costs(), self._gpu.multiprocessors)

    @property
    def seconds(self) -> dict[str, float]:
        """GPU time so far: ``compute``, ``merge``, and ``exchange`` where kernels waited for it."""
        return self._clock.seconds()

    def describe(self) -> dict[str, str]:
        """The GPU, the libraries and the way of the messages."""
        return {"cudnn": self._sdpa.version, **self._facts}

    def close(self) -> None:
        """Collective. Release everything, in order."""
        if not self._open:
            return
        self._gpu.synchronize()
        self._open = False
        if self._copies is not None:
            self._copies.close()
        if self._nccl is not None:
            self._nccl.close()
        self._uploading.clear()
        self._sdpa.close()
        self.memory.close()
        self.host.close()

    def abort(self) -> None:
        """Let go without waiting for any other rank."""
        self._open = False
        if self._nccl is not None:
            self._nccl.abort()


class _Clock:
    """Where the GPU's time went, from pairs of events that are looked at once both are past."""

    def __init__(self, gpu: Any, runs: bool) -> None:
        self._gpu = gpu
        self.runs = runs
        self._seconds = {"compute": 0.0, "exchange": 0.0, "merge": 0.0}
        self._open: deque[tuple[str, Fence, Any]] = deque()

    def time(self, stream: Any) -> Any:
        """Mark a place in `stream`; None where nobody wants to know."""
        return self._gpu.record(stream, timed=True) if self.runs else None

    def computed(self, start: Any, end: Any) -> None:
        """All of an item's attention went on from `start` to `end`, merges and waits included."""
        self._add("compute", (start,), end)

    def merged(self, start: Any, end: Any) -> None:
        """A merge went on from `start` to `end`."""
        self._add("merge", (start,), end)

    def waited(self, ready: Fence, arrived: Any) -> None:
        """Kernels were through with `ready` and had to wait until `arrived`."""
        self._add("exchange", ready, arrived)

    def seconds(self) -> dict[str, float]:
        """Add up what is past."""
        while self._open and all(event.is_done for event in (*self._open[0][1], self._open[0][2])):
            phase, starts, end = self._open.popleft()
            taken = max(0.0, min(end - start for start in starts)) / 1e3
            self._seconds[phase] += taken
            if phase == "exchange":
                self._seconds["compute"] -= taken
        return dict(self._seconds)

    def _add(self, phase: str, starts: Fence, end: Any) -> None:
        if not self.runs:
            return
        self._open.append((phase, starts, end))
        if len(self._open) > 256:
            self.seconds()


def importer(kind: type) -> Callable[[Any], Any]:
    """Find the function by which the library of `kind` takes arrays by DLPack."""
    names = {"torch": "torch", "cupy": "cupy", "jaxlib": "jax.dlpack", "jax": "jax.dlpack"}
    name = names.get(kind.__module__.partition(".")[0])
    return import_module(name).from_dlpack if name else lambda exported: exported


def key_of(
    q: DeviceArray,
    k: DeviceArray,
    v: DeviceArray,
    output: tuple[int, ...],
    lse: tuple[int, ...],
    causal: bool,
    scale: float,
) -> PlanKey:
    """Describe an attention call to cuDNN; `output` and `lse` are strides."""
    return PlanKey(
        *(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2]),
        name_of(q.dtype), causal, scale, q.strides, k.strides, v.strides, output, lse,
    )  # fmt: skip


def sample_key(problem: AttentionProblem, q_tokens: int, kv_tokens: int) -> PlanKey:
    """Describe a call like those that `problem` will need."""

    def strides(heads: int, dim: int) -> tuple[int, int, int]:
        return heads * dim, dim, 1

    heads, kv_heads, dim = problem.q_heads, problem.kv_heads, problem.head_dim
    return PlanKey(
        q_tokens, kv_tokens, heads, kv_heads, dim, problem.v_head_dim,
        problem.dtype, problem.causal != "none", problem.scale,
        strides(heads, dim), strides(kv_heads, dim), strides(kv_heads, problem.v_head_dim),
        strides(heads, problem.v_head_dim), (heads, 1),
    )  # fmt: skip


@cache
def name_of(dtype: np.dtype[Any]) -> Any:
    """Return the name of a dtype; asking NumPy takes microseconds."""
    return str(dtype)


def complement(spans: Sequence[Span], length: int) -> list[Span]:
    """Find the runs of ``[0, length)`` that no span covers."""
    found, start = [], 0
    for span in sorted(spans):
        found.append(Span(start, span.start))
        start = max(start, span.stop)
    return [span for span in (*found, Span(start, length)) if span.stop > span.start]


def pieces_of(rows: Span, calls: Sequence[Launched]) -> list[Span]:
    """Cut `rows` where a call begins or ends."""
    cuts = {rows.start, rows.stop}
    for call in calls:
        cuts |= {cut for cut in (call.rows.start, call.rows.stop) if rows.start < cut < rows.stop}
    return [Span(start, stop) for start, stop in pairwise(sorted(cuts))]


def _part(call: Launched) -> Part:
    return Part(call.output.address, call.lse.address, call.rows.start, call.rows.stop)


def _overlap(one: Span, other: Span) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _by_peer(messages: Sequence[Message]) -> dict[int, list[DeviceArray]]:
    found: dict[int, list[DeviceArray]] = {}
    for array, peer in messages:
        if array.size:
            assert array.is_contiguous, "a message is contiguous"
            found.setdefault(peer, []).append(array)
    return found


def _spans(messages: dict[int, list[DeviceArray]]) -> dict[int, list[tuple[int, int]]]:
    return {
        peer: [(array.address, array.nbytes) for array in arrays]
        for peer, arrays in messages.items()
    }


def _pitch(array: DeviceArray, run: int) -> int:
    return run if array.is_contiguous else array.rows()[2]
