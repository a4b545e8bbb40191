"""Attention calls and merges, in streams that are called lanes.

Each lane is less urgent than the one before it: a call fills the multiprocessors that the end of
the call before it leaves idle, and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from mdattn_mpi.devices.cuda.arena import Arena
from mdattn_mpi.devices.cuda.attention import AttentionCall
from mdattn_mpi.devices.cuda.choice import Choice
from mdattn_mpi.devices.cuda.clock import Clock
from mdattn_mpi.devices.cuda.gpu import Event, Gpu
from mdattn_mpi.devices.cuda.launches import Launches
from mdattn_mpi.devices.cuda.memory import DeviceArray, Memory
from mdattn_mpi.devices.cuda.merge import PARTS, MergeCall, Part
from mdattn_mpi.devices.cuda.order import Fence, Queue, latest
from mdattn_mpi.devices.cuda.packing import Offsets, Run, runs
from mdattn_mpi.devices.cuda.partials import Launched, Partials, Region, overlap, pieces_of
from mdattn_mpi.devices.protocol import Rehearsed
from mdattn_mpi.mask import LOWER_RIGHT, Band, Span
from mdattn_mpi.partition import Block
from mdattn_mpi.problem import AttentionProblem

LANES = 4
FLOAT32, BYTE = np.dtype(np.float32), np.dtype(np.uint8)
SAMPLE = 1024  # tokens of the problem that `choose` tries
WORKSPACE = 1 << 20
NOTHING: Fence = {}


class Kernels:
    """The attention and merge kernels of one GPU.

    Parameters
    ----------
    gpu, launches, memory, offsets
        The driver, the attention calls that it can launch, device memory, and where packed
        documents begin.
    clock
        Is told what takes how long.

    Attributes
    ----------
    lanes
        The streams of the kernels, the most urgent one first.
    main
        That one, where everything begins and ends.
    borrowed
        Arrays of others that captured calls read; until `let_go`.

    """

    def __init__(
        self,
        gpu: Gpu,
        launches: Launches,
        memory: Memory | Arena,
        offsets: Offsets,
        clock: Clock,
    ) -> None:
        self._gpu, self._launches, self._memory, self._clock = gpu, launches, memory, clock
        self.lanes = [Queue(gpu, gpu.stream(LANES - lane)) for lane in range(LANES)]
        self.main = self.lanes[0]
        self._workspaces: dict[Queue, DeviceArray] = {}
        self._offsets = offsets
        self.borrowed: list[DeviceArray] = []

    def join(self) -> None:
        """Let what begins in `main` come after all kernels so far."""
        self.main.wait(*(lane.now for lane in self.lanes))

    def tails(self) -> list[Event]:
        """Record timed events of all kernels so far."""
        return [
            lane.mark(timed=True)
            for lane in self.lanes
            if lane is self.main or not self.main.follows(lane, lane.count)
        ]

    def accumulator(
        self, q: DeviceArray, v_head_dim: int, scale: float, softcap: float, merged: Span
    ) -> Partials:
        """See `Device.accumulator`."""
        rows, heads = q.shape[:2]
        output = self._memory.empty((rows, heads, v_head_dim), q.dtype)
        lse = self._memory.empty((rows, heads), FLOAT32)
        self.join()
        self.main.wait(q.allocation.written, output.allocation.used, lse.allocation.used)
        start = self._clock.time(self.main)
        regions = [
            Region(span, q[span.slice], output[span.slice], lse[span.slice], span == merged)
            for span in (Span(0, merged.start), merged, Span(merged.stop, rows))
            if len(span)
        ]
        return Partials(scale, softcap, output, lse, regions, self._begin(), start)

    def attend(
        self, partials: Partials, blocks: Sequence[Block], k: DeviceArray, v: DeviceArray
    ) -> None:
        """See `Device.attend`."""
        if k.size and v.size and partials.output.size:
            for run in runs(blocks):
                self._attend(partials, run, k, v)

    def _attend(self, partials: Partials, run: Run, all_k: DeviceArray, all_v: DeviceArray) -> None:
        region = partials.region(run.q)
        rows = run.q.shift(-region.rows.start)
        q, k, v = region.q[rows.slice], all_k[run.kv.slice], all_v[run.kv.slice]
        output, lse = region.output[rows.slice], region.lse[rows.slice]
        call = call_of(partials, q, k, v, output, lse, run)
        if self._is_for_many(run, call):
            for one in run.alone:
                self._attend(partials, one, all_k, all_v)
            return
        first, full = not region.covers(rows), region.is_full
        lane = self.lanes[partials.calls % LANES]
        partials.calls += 1
        lane.wait(partials.begin, k.allocation.written, v.allocation.written)
        wide = self._is_wide(region, call)
        if wide:
            call = call._replace(out_dtype="float32")
        if not first:
            dtype = FLOAT32 if wide else q.dtype
            output = self._memory.empty((len(rows), *output.shape[1:]), dtype)
            lse = self._memory.empty((len(rows), lse.shape[1]), FLOAT32)
            lane.wait(output.allocation.used, lse.allocation.used)
        elif region.wide is not None:
            output = region.wide[rows.slice]
            lane.wait(region.begin)
        self._launch(lane, call, (q, k, v), (output, lse))
        if full and not first:  # only now: the call needn't wait for the fold
            self._fold(partials, region)
        launched = Launched(rows, lane, lane.now, output, lse)
        (region.first if first else region.more).append(launched)

    def finish(
        self, partials: Partials, sinks: DeviceArray | None
    ) -> tuple[DeviceArray, DeviceArray]:
        """See `Device.finish`."""
        output, lse = partials.output, partials.lse
        if output.size:
            for region in partials.regions:
                every = [Span(0, len(region.rows))]
                for rows in region.unmerged if sinks is None else every:
                    self._merge(partials, region, rows, region.output, region.lse, sinks)
        self.join()
        for array in (output, lse):  # one place to wait for, whichever lanes wrote it
            array.allocation.written = self.main.now
            array.allocation.read(self.main.now)
        self._clock.computed(partials.start, self._clock.time(self.main))
        return output, lse

    def choose(self, problem: AttentionProblem) -> Choice:
        """Choose the engine for a problem's calls, or refuse it with the reason."""
        rows, keys = (min(SAMPLE, n) for n in (problem.q_tokens, problem.kv_tokens))
        keys, heads = max(rows, keys), (problem.q_heads, problem.kv_heads)
        blocks = [Block(Span(0, rows), Span(0, keys), band) for band in bands_of(problem)]
        calls = (plain_call(problem, *heads, Run((block,), block.band)) for block in blocks)
        choices = [self._launches.chooser.choose(call) for call in calls]
        return choices[0]

    def prepare(self, problem: AttentionProblem, calls: Iterable[Rehearsed]) -> None:
        """Make calls ready that will come."""
        found = []
        for each in calls:
            for run in runs(each.blocks):
                call = plain_call(problem, each.q_heads, each.kv_heads, run)
                single = run.alone if self._is_for_many(run, call) else [run]
                wide = each.merged and self._launches.chooser.choose(call).float32
                for one in single:
                    call = plain_call(problem, each.q_heads, each.kv_heads, one)
                    found.append(call._replace(out_dtype="float32") if wide else call)
        self._launches.prepare(found)

    def let_go(self) -> None:
        """Let go of what kernels need besides; the next ones get some again."""
        self._workspaces.clear()
        self.borrowed = []

    def abort(self) -> None:
        """Make no more calls ready; wait for nothing."""
        self._launches.abort()

    def close(self) -> None:
        """Release the engines."""
        self._launches.close()

    def _begin(self) -> Fence:
        """Mark a place in `main` before it has what the other lanes needn't wait for."""
        self.main.mark()
        return self.main.now

    def _is_for_many(self, run: Run, call: AttentionCall) -> bool:
        """Whether the blocks of a run take a call each."""
        return len(run.blocks) > 1 and not self._launches.chooser.choose(call).packs

    def _is_wide(self, region: Region, call: AttentionCall) -> bool:
        """Whether a region's results are in float32: from its first call on, or never."""
        if not region.partial:
            return False
        if region.wide is None and not region.first:
            if self._launches.chooser.choose(call).float32:
                region.wide = self._memory.empty(region.output.shape, FLOAT32)
                region.begin = dict(region.wide.allocation.used)
            else:
                region.partial = False
        return region.wide is not None

    def _launch(
        self,
        lane: Queue,
        call: AttentionCall,
        inputs: tuple[DeviceArray, ...],
        outputs: tuple[DeviceArray, ...],
    ) -> None:
        launch = self._launches.get(call)
        offsets = [self._offsets.get(starts) for starts in call.documents if starts]
        addresses = tuple(array.address for array in (*inputs, *outputs, *offsets))
        workspace = self._workspace(lane, launch.workspace)
        lane.enqueue(launch.run, addresses, workspace.address)
        end = lane.now
        for array in (*inputs, workspace):
            array.allocation.read(end)
        if lane.captured:  # whoever owns the graph keeps them
            self.borrowed += offsets
        else:
            for array in offsets:
                array.allocation.read(end)
        for array in outputs:
            array.allocation.wrote(end)

    def _merge(
        self,
        partials: Partials,
        region: Region,
        rows: Span,
        output: DeviceArray,
        lse: DeviceArray,
        sinks: DeviceArray | None = None,
        begin: Fence = NOTHING,
    ) -> None:
        """Merge all results of `rows` into `output` and `lse`, before less urgent calls end."""
        launched = [*region.first, *region.more]
        calls = [call for call in launched if overlap(rows, call.rows)]
        if len(calls) > PARTS:  # no row has so many: go on piece by piece
            for piece in pieces_of(rows, region.first):
                self._merge(partials, region, piece, output, lse, sinks, begin)
            return
        # `main`, unless it has more to do first: then the lane of the last of these calls.
        others = {call.lane for call in launched if call not in calls}
        lane = calls[-1].lane if calls and self.main in others else self.main
        running = region.folded
        lane.wait(partials.begin, begin, *(call.end for call in calls))
        if sinks is not None:
            lane.wait(sinks.allocation.written)
        if running:
            lane.wait(*(array.allocation.written for array in running))
        start = self._clock.time(lane)
        lane.enqueue(
            self._gpu.merge,
            MergeCall(
                kind=name_of(region.q.dtype if region.wide is None else FLOAT32),
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
                sinks=0 if sinks is None else sinks.address,
            ),
        )
        self._clock.merged(start, self._clock.time(lane))
        end = lane.now
        for array in (output, lse):
            array.allocation.wrote(end)
        inputs = [array for call in calls for array in (call.output, call.lse)]
        inputs += [*(running or ()), *(() if sinks is None else (sinks,))]
        for array in inputs:
            array.allocation.read(end)

    def _fold(self, partials: Partials, region: Region) -> None:
        """Merge all results so far into one in float32, to bound memory."""
        begin = NOTHING
        if region.folded:
            output, lse = region.folded
        elif region.wide is not None:
            output, lse = region.wide, region.lse
        else:
            output = self._memory.empty(region.output.shape, FLOAT32)
            lse = self._memory.empty(region.lse.shape, FLOAT32)
            begin = latest(output.allocation.used, lse.allocation.used)
        self._merge(partials, region, Span(0, len(region.rows)), output, lse, begin=begin)
        region.folded = output, lse
        region.first, region.more = [], []

    def _workspace(self, lane: Queue, nbytes: int) -> DeviceArray:
        """Return bytes that only this lane uses."""
        workspace = self._workspaces.get(lane)
        if workspace is None or workspace.nbytes < nbytes:
            workspace = self._memory.empty((max(nbytes, WORKSPACE),), BYTE)
            lane.wait(workspace.allocation.used)
            self._workspaces[lane] = workspace
        return workspace


def call_of(
    partials: Partials,
    q: DeviceArray,
    k: DeviceArray,
    v: DeviceArray,
    output: DeviceArray,
    lse: DeviceArray,
    run: Run,
) -> AttentionCall:
    """Describe a call with the result in the dtype of the query."""
    dtype = name_of(q.dtype)
    return AttentionCall(
        *(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2]),
        dtype, dtype, run.band, partials.scale, partials.softcap,
        q.strides, k.strides, v.strides, output.strides, lse.strides, run.documents,
    )  # fmt: skip


def bands_of(problem: AttentionProblem) -> list[Band]:
    """Return a band of each kind that the calls of a problem may have, the commonest first."""
    mask = problem.mask
    if mask.low is None and problem.causal != "none":
        return [LOWER_RIGHT]
    befores = (None,) if mask.low is None else (1, None)
    afters = (None,) if mask.high is None else (1, 0, None)
    return [Band(before, after) for before in befores for after in afters]


def plain_call(problem: AttentionProblem, q_heads: int, kv_heads: int, run: Run) -> AttentionCall:
    """Describe a call on contiguous arrays, with the result in the dtype of the query."""

    def strides(heads: int, dim: int) -> tuple[int, int, int]:
        return heads * dim, dim, 1

    dim, v_dim, dtype = problem.head_dim, problem.v_head_dim, problem.dtype
    return AttentionCall(
        len(run.q), len(run.kv), q_heads, kv_heads, dim, v_dim, dtype, dtype,
        run.band, problem.scale, problem.softcap,
        strides(q_heads, dim), strides(kv_heads, dim), strides(kv_heads, v_dim),
        strides(q_heads, v_dim), (q_heads, 1), run.documents,
    )  # fmt: skip


@cache
def name_of(dtype: np.dtype[Any]) -> Any:
    """Return the name of a dtype; asking NumPy takes microseconds."""
    return str(dtype)


def _part(call: Launched) -> Part:
    return Part(call.output.address, call.lse.address, call.rows.start, call.rows.stop)
