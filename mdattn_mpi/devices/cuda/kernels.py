"""Attention calls and merges, in streams that are called lanes.

Each lane is less urgent than the one before it: a call fills the multiprocessors that the end of
the call before it leaves idle, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from mdattn_mpi.devices.cuda.clock import Clock
from mdattn_mpi.devices.cuda.cudnn import PlanKey
from mdattn_mpi.devices.cuda.memory import DeviceArray, Memory
from mdattn_mpi.devices.cuda.merge import PARTS, MergeCall, Part
from mdattn_mpi.devices.cuda.order import Fence, Queue
from mdattn_mpi.problem import AttentionProblem, Span

LANES = 4
FLOAT32, BYTE = np.dtype(np.float32), np.dtype(np.uint8)
SAMPLE = 1024  # tokens of the problem that `check` tries
WORKSPACE = 1 << 20


@dataclass(eq=False)
class Launched:
    """An attention call, and where its result lies."""

    rows: Span
    lane: Queue
    end: Fence
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
    begin: Fence  # what its calls come after, whichever lane they are in
    start: Any
    calls: int = 0
    first: list[Launched] = field(default_factory=list)
    more: list[Launched] = field(default_factory=list)
    running: tuple[DeviceArray, DeviceArray] | None = None  # float32, of all rows

    def covers(self, rows: Span) -> bool:
        """Whether any of `rows` has a result already."""
        return self.running is not None or any(_overlap(rows, call.rows) for call in self.first)


class Kernels:
    """The attention and merge kernels of one GPU.

    Parameters
    ----------
    gpu, sdpa, memory
        The driver, cuDNN's attention, and device memory.
    clock
        Is told what takes how long.

    Attributes
    ----------
    main
        The most urgent lane, where everything begins and ends.

    """

    def __init__(self, gpu: Any, sdpa: Any, memory: Memory, clock: Clock) -> None:
        self._gpu, self._sdpa, self._memory, self._clock = gpu, sdpa, memory, clock
        self._lanes = [Queue(gpu, gpu.stream(LANES - lane)) for lane in range(LANES)]
        self.main = self._lanes[0]
        self._workspaces: dict[Queue, DeviceArray] = {}

    def join(self) -> None:
        """Let what begins in `main` come after all kernels so far."""
        self.main.wait(*(lane.now for lane in self._lanes))

    def tails(self) -> list[Any]:
        """Record timed events of all kernels so far."""
        return [
            lane.mark(timed=True)
            for lane in self._lanes
            if lane is self.main or not self.main.follows(lane, lane.count)
        ]

    def accumulator(self, q: DeviceArray, v_head_dim: int, scale: float) -> Partials:
        """See `Device.accumulator`."""
        rows, heads = q.shape[:2]
        output = self._memory.empty((rows, heads, v_head_dim), q.dtype)
        lse = self._memory.empty((rows, heads), FLOAT32)
        self.join()
        self.main.wait(q.storage.written, output.storage.used, lse.storage.used)
        start = self._clock.time(self.main)
        return Partials(q, scale, output, lse, self._begin(), start)

    def attend(
        self, partials: Partials, rows: Span, k: DeviceArray, v: DeviceArray, causal: bool
    ) -> None:
        """See `Device.attend`."""
        if not (len(rows) and k.size and v.size and partials.q.size):
            return
        first = not partials.covers(rows)
        if not first and len(partials.first) + len(partials.more) >= PARTS:
            self._fold(partials)
        lane = self._lanes[partials.calls % LANES]
        partials.calls += 1
        lane.wait(partials.begin, k.storage.written, v.storage.written)
        if first:
            output, lse = partials.output[rows.slice], partials.lse[rows.slice]
        else:
            output = self._memory.empty((len(rows), *partials.output.shape[1:]), partials.q.dtype)
            lse = self._memory.empty((len(rows), partials.lse.shape[1]), FLOAT32)
            lane.wait(output.storage.used, lse.storage.used)
        self._launch(lane, partials.q[rows.slice], k, v, output, lse, causal, partials.scale)
        call = Launched(rows, lane, lane.now, output, lse)
        (partials.first if first else partials.more).append(call)

    def finish(self, partials: Partials) -> tuple[DeviceArray, DeviceArray]:
        """See `Device.finish`."""
        output, lse = partials.output, partials.lse
        if output.size:
            alone = [
                call.rows
                for call in partials.first
                if not any(_overlap(call.rows, other.rows) for other in partials.more)
            ]
            for rows in complement(() if partials.running else alone, output.shape[0]):
                self._merge(partials, rows, output, lse)
        self.join()
        for array in (output, lse):  # one place to wait for, whichever lanes wrote it
            array.storage.written = self.main.now
            array.storage.read(self.main.now)
        self._clock.computed(partials.start, self._clock.time(self.main))
        return output, lse

    def check(self, problem: AttentionProblem) -> None:
        """Refuse what cuDNN can't do on this GPU, with the reason."""
        q_tokens, kv_tokens = (min(SAMPLE, n) for n in (problem.q_tokens, problem.kv_tokens))
        self._sdpa.plan(sample_key(problem, q_tokens, max(q_tokens, kv_tokens)))

    def _begin(self) -> Fence:
        """Mark a place in `main` before it has what the other lanes needn't wait for."""
        self.main.mark()
        return self.main.now

    def _launch(
        self,
        lane: Queue,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        output: DeviceArray,
        lse: DeviceArray,
        causal: bool,
        scale: float,
    ) -> None:
        plan = self._sdpa.plan(key_of(q, k, v, output.strides, lse.strides, causal, scale))
        workspace = self._workspace(lane, plan.workspace)
        addresses = (q.address, k.address, v.address, output.address, lse.address)
        lane.enqueue(self._sdpa.run, plan, addresses, workspace.address)
        end = lane.now
        for array in (q, k, v, workspace):
            array.storage.read(end)
        for array in (output, lse):
            array.storage.wrote(end)

    def _merge(self, partials: Partials, rows: Span, output: DeviceArray, lse: DeviceArray) -> None:
        """Merge all results of `rows` into `output` and `lse`, before less urgent calls end."""
        launched = [*partials.first, *partials.more]
        calls = [call for call in launched if _overlap(rows, call.rows)]
        if len(calls) > PARTS:  # no row has so many: go on piece by piece
            for piece in pieces_of(rows, partials.first):
                self._merge(partials, piece, output, lse)
            return
        # `main`, unless it has more to do first: then the lane of the last of these calls.
        others = {call.lane for call in launched if call not in calls}
        lane = calls[-1].lane if calls and self.main in others else self.main
        running = partials.running
        lane.wait(partials.begin, *(call.end for call in calls))
        start = self._clock.time(lane)
        lane.enqueue(
            self._gpu.merge,
            MergeCall(
                kind=name_of(partials.q.dtype),
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
        )
        self._clock.merged(start, self._clock.time(lane))
        end = lane.now
        for array in (output, lse):
            array.storage.wrote(end)
        for array in (*(a for call in calls for a in (call.output, call.lse)), *(running or ())):
            array.storage.read(end)

    def _fold(self, partials: Partials) -> None:
        """Merge all results so far into one in float32, to bound memory."""
        if partials.running is None:
            output = self._memory.empty(partials.output.shape, FLOAT32)
            lse = self._memory.empty(partials.lse.shape, FLOAT32)
            self.main.wait(output.storage.used, lse.storage.used)
            partials.begin = self._begin()
        else:
            output, lse = partials.running
        self._merge(partials, Span(0, partials.output.shape[0]), output, lse)
        self.join()
        partials.begin = self._begin()
        partials.running = output, lse
        partials.first, partials.more = [], []

    def _workspace(self, lane: Queue, nbytes: int) -> DeviceArray:
        """Return bytes that only this lane uses."""
        workspace = self._workspaces.get(lane)
        if workspace is None or workspace.nbytes < nbytes:
            workspace = self._memory.empty((max(nbytes, WORKSPACE),), BYTE)
            lane.wait(workspace.storage.used)
            self._workspaces[lane] = workspace
        return workspace


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
