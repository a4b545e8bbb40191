"""One GPU a rank: one kernel attends, copy engines or NCCL carry, another kernel merges in float32.

Kernels, uploads, downloads and messages have streams of their own, tied by what they read and
write alone (see `order`): a batch moves item i+1 to the GPU and between GPUs while item i computes
and item i-1 goes back to the host. The host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.costs import Costs, gpu_costs
from mdattn_mpi.devices.cuda.arena import Arena
from mdattn_mpi.devices.cuda.clock import Clock
from mdattn_mpi.devices.cuda.copies import Carrier
from mdattn_mpi.devices.cuda.gpu import Event, Gpu, Network
from mdattn_mpi.devices.cuda.interop import Interop
from mdattn_mpi.devices.cuda.kernels import Kernels
from mdattn_mpi.devices.cuda.launches import Launches
from mdattn_mpi.devices.cuda.memory import DeviceArray, HostBuffers, Memory
from mdattn_mpi.devices.cuda.messages import Transfer, before, by_peer, spans
from mdattn_mpi.devices.cuda.order import Fence, Held, Queue, extend, latest
from mdattn_mpi.devices.cuda.packing import Offsets
from mdattn_mpi.devices.cuda.partials import Partials
from mdattn_mpi.devices.protocol import NO_ROWS, Message, Rehearsed
from mdattn_mpi.estimate import head_start
from mdattn_mpi.mask import Span
from mdattn_mpi.partition import Block
from mdattn_mpi.problem import AttentionProblem, Plan

ALIGNED = 16  # bytes
URGENT = 5  # as a stream; see `driver.Gpu.stream`


@dataclass(eq=False)
class Download:
    """Arrays on their way to the host."""

    arrays: tuple[NDArray[Any], ...]
    end: Event

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
    gpu, launches
        The driver, and what attends on this rank's GPU.
    copies, nccl
        The way to the ranks in `near`, and to all others; None where no rank needs it.
    near
        The ranks that copy engines reach.
    memory
        Device memory; shared with `copies`.
    offsets
        Where packed documents begin.
    facts
        What `describe` says besides.
    limit
        Bytes of GPU memory that every rank of the group has.
    timings
        Whether `seconds` is wanted: it costs a lone short item some microseconds.

    Attributes
    ----------
    kernels, clock
        What attends and merges; where the time went.

    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        gpu: Gpu,
        launches: Launches,
        *,
        memory: Memory | Arena,
        offsets: Offsets,
        copies: Carrier | None = None,
        nccl: Network | None = None,
        near: Iterable[int] = (),
        facts: Mapping[str, str] | None = None,
        limit: int = 0,
        node_size: int = 1,
        timings: bool = True,
    ) -> None:
        self._rank, self._ranks = rank, ranks
        self._gpu, self._chooser = gpu, launches.chooser
        self._copies, self._nccl, self._near = copies, nccl, frozenset(near)
        self.memory, self._offsets = memory, offsets
        self.host = HostBuffers(gpu)
        self._facts, self._limit, self._node_size = dict(facts or {}), limit, node_size
        self.clock = Clock(timings)
        self.kernels = Kernels(gpu, launches, memory, offsets, self.clock)
        self._upwards = Queue(gpu, gpu.stream())
        self._downwards = Queue(gpu, gpu.stream(), leaves=True)
        self._within, self._net = Queue(gpu, gpu.stream()), Queue(gpu, gpu.stream(URGENT))
        self._uploading = Held()
        self._interop = Interop(gpu)
        self._open = True

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self._rank

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return self._ranks

    @property
    def queues(self) -> tuple[Queue, ...]:
        """All streams but those of other libraries."""
        own = (self._upwards, self._downwards, self._within, self._net)
        return (*self.kernels.lanes, *own, *(self._copies.queues if self._copies else ()))

    # -- arrays ------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], like: DeviceArray) -> DeviceArray:
        """An array with undefined contents, of the dtype of `like`."""
        return self.memory.empty(shape, like.dtype)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy `source` into `target`; same shape, any strides."""
        if source.size:
            main = self.kernels.main
            main.wait(*before([source], [target]))
            self.move(main, source, target)
            source.allocation.read(main.now)
            target.allocation.wrote(main.now)

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in pinned memory: `upload` takes it while the host goes on."""
        return self.host.empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """Take an array from the host; from `host` it goes while the host goes on."""
        source = np.ascontiguousarray(array)
        target = self.memory.empty(source.shape, source.dtype)
        if not source.size:
            return target
        up = self._upwards
        up.wait(target.allocation.used)
        up.enqueue(self._gpu.copy, target.address, source.ctypes.data, source.nbytes)
        target.allocation.wrote(up.now)
        self._uploading.hold(source, up.now)
        return target

    def download(self, *arrays: DeviceArray) -> Download:
        """Start bringing arrays to the host."""
        found = tuple(self.host.empty(array.shape, array.dtype) for array in arrays)
        down = self._downwards
        down.wait(*(array.allocation.written for array in arrays))
        for array, target in zip(arrays, found, strict=True):
            if array.size:
                down.enqueue(self._gpu.copy, target.ctypes.data, array.address, array.nbytes)
        for array in arrays:
            array.allocation.read(down.now)
        return Download(found, down.mark())

    def adopt(self, array: Any) -> DeviceArray:
        """Take an array of another library on this GPU, by DLPack.

        Copied only if it is strided, which messages can't be, or begins between multiples of 16
        bytes, which kernels load at a time. Who waits for whom is said in `interop`.
        """
        adopted = self._interop.adopt(array)
        if adopted.is_contiguous and adopted.address % ALIGNED == 0:
            return adopted
        own = self.memory.empty(adopted.shape, adopted.dtype)
        self.copy(adopted, own)
        return own

    def export(self, array: DeviceArray) -> Any:
        """Give an array to the library that `adopt` was last given one of; nothing is copied."""
        return self._interop.export(array)

    def lend_stream(self) -> tuple[int, int]:
        """Open a stream for a library that `adopt` is given `dlpack.Borrowed` arrays of.

        Nobody waits on the host: the library's work comes after what it is given by `export`, which
        are device arrays, and ours after what is adopted. Return the GPU's ordinal and the handle.
        """
        stream = self._gpu.stream()
        self._interop.lend(stream)
        return self._gpu.ordinal, int(stream.handle)

    def mark(self) -> Event:
        """Record all kernels so far; marks give milliseconds by ``-`` once they are past."""
        self.kernels.join()
        return self.kernels.main.mark(timed=True)

    # -- messages ----------------------------------------------------------------------------------

    def exchange(
        self, send: Sequence[Message[DeviceArray]], receive: Sequence[Message[DeviceArray]]
    ) -> Transfer:
        """Collective. Start sending and receiving; return once the hosts have spoken."""
        away, coming = by_peer(send), by_peer(receive)
        own, kept = away.pop(self._rank, []), coming.pop(self._rank, [])
        received = [array for arrays in coming.values() for array in arrays]
        sent = [array for arrays in away.values() for array in arrays]
        assert all(array.is_contiguous for array in (*sent, *received)), "a message is contiguous"
        near_out, far_out = self._split(away)
        near_in, far_in = self._split(coming)
        copies, last = None, None
        ends: Fence = {}
        if own:
            last = self._keep(own, kept)
            extend(ends, self._within.now)
        if near_out or near_in:
            assert self._copies is not None
            copies = self._copies.exchange(near_out, near_in)
        if far_out or far_in:
            last = self._exchange_far(far_out, far_in)
            extend(ends, self._net.now)
        # Only now: many messages may go into one array, each into a place of its own.
        for array in (*own, *sent):
            array.allocation.read(latest(ends, copies.sent if copies else {}))
        for array in (*kept, *received):
            array.allocation.written = {}  # it is gone; nothing may read before `wait` says when
            array.allocation.read(ends)
        return Transfer(received, kept, sent + own, copies, ends, last)

    def wait(self, transfer: Transfer) -> None:
        """Let everything that follows see what `transfer` received."""
        ends, last = dict(transfer.ends), transfer.last
        if transfer.copies and transfer.copies.expected:
            assert self._copies is not None
            arrived, last = self._copies.arrival(transfer.copies)
            extend(ends, arrived)
        if transfer.received and last is not None and self.clock.runs:
            self.clock.waited(self.kernels.tails(), last)
        for array in (*transfer.kept, *transfer.received):
            array.allocation.wrote(ends)

    def _keep(self, sources: list[DeviceArray], targets: list[DeviceArray]) -> Event:
        """Copy a message to the rank itself; return a timed event of its end."""
        self._within.wait(*before(sources, targets))
        for source, target in zip(sources, targets, strict=True):
            self.move(self._within, source, target)
        return self._within.mark(timed=True)

    def _exchange_far(
        self, send: dict[int, list[DeviceArray]], receive: dict[int, list[DeviceArray]]
    ) -> Event:
        """Exchange with ranks that NCCL reaches; return a timed event of the end."""
        self._net.wait(*before(chain(*send.values()), chain(*receive.values())))
        out, into, nccl = spans(send), spans(receive), self._nccl
        assert nccl is not None
        self._net.enqueue(lambda stream: nccl.exchange(out, into, int(stream.handle)))
        return self._net.mark(timed=True)

    def _split(
        self, messages: dict[int, list[DeviceArray]]
    ) -> tuple[dict[int, list[DeviceArray]], dict[int, list[DeviceArray]]]:
        near = {peer: arrays for peer, arrays in messages.items() if peer in self._near}
        return near, {peer: arrays for peer, arrays in messages.items() if peer not in near}

    def move(self, queue: Queue, source: DeviceArray, target: DeviceArray) -> None:
        """Copy in a stream that comes after all that it must; any strides."""
        if not source.size:
            return
        if source.is_contiguous and target.is_contiguous:
            queue.enqueue(self._gpu.copy, target.address, source.address, source.nbytes)
            return
        runs_out, runs_in = source.rows(), target.rows()
        if runs_out and runs_in:
            rows, run, _ = min(runs_out, runs_in, key=lambda runs: runs[1])
            into = target.address, run if target.is_contiguous else runs_in[2]
            out = source.address, run if source.is_contiguous else runs_out[2]
            queue.enqueue(self._gpu.copy_rows, *into, *out, run, rows)
            return
        dim = int(source.shape[1] <= source.shape[0])  # the one with fewer pieces
        for index in range(source.shape[dim]):
            piece = (slice(None),) * dim + (slice(index, index + 1),)
            self.move(queue, source[piece], target[piece])

    # -- attention ---------------------------------------------------------------------------------

    def accumulator(
        self,
        q: DeviceArray,
        v_head_dim: int,
        scale: float,
        softcap: float = 0.0,
        merged: Span = NO_ROWS,
    ) -> Partials:
        """Start with nothing seen: output 0, LSE −∞, for each row and head of `q`.

        The results of `merged` rows stay in float32 until they are merged, where a kernel can.
        """
        return self.kernels.accumulator(q, v_head_dim, scale, softcap, merged)

    def attend(
        self, accumulator: Partials, blocks: Sequence[Block], k: DeviceArray, v: DeviceArray
    ) -> None:
        """Add the attention of rows of the query to what they see of `k` and `v`."""
        self.kernels.attend(accumulator, blocks, k, v)

    def finish(
        self, accumulator: Partials, sinks: DeviceArray | None = None
    ) -> tuple[DeviceArray, DeviceArray]:
        """Merge what has more than one result, or a sink, in float32, rounded once."""
        return self.kernels.finish(accumulator, sinks)

    def perform(
        self,
        attend: Callable[..., Any],
        plan: Plan,
        *inputs: DeviceArray,
        ahead: bool = False,
        **options: Any,
    ) -> Generator[None, None, tuple[DeviceArray, DeviceArray]]:
        """See `protocol.HostedDevice`; only a `replaying.ReplayingDevice` does more than that."""
        return attend(self, plan, *inputs, **options)  # type: ignore[no-any-return]

    def is_ready(self, plan: Plan, **options: Any) -> bool:
        """See `protocol.HostedDevice`; only a `replaying.ReplayingDevice` may say so."""
        return False

    # -- what it is and what it takes --------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> tuple[str, ...]:
        """Refuse what no kernel can do on this GPU; say which one will, and why."""
        choice = self.kernels.choose(problem)
        partial = "float32" if choice.float32 else problem.dtype
        return (f"kernel {choice.reason}; partial results in {partial}",)

    def prepare(self, problem: AttentionProblem, calls: Iterable[Rehearsed]) -> None:
        """Make calls of the kernel ready, in a thread, before they are wanted."""
        self.kernels.prepare(problem, calls)

    def costs(self, problem: AttentionProblem) -> Costs:
        """Rough figures of this GPU, its links, and the kernel that takes `problem`."""
        near = len(self._near) == self._ranks - 1
        memory = int(0.92 * self._limit)
        choice = self.kernels.choose(problem)
        return gpu_costs(
            self._gpu.sm[0],
            self._gpu.multiprocessors,
            near=near,
            node_size=self._node_size,
            memory=memory,
            preparing=choice.engine.preparing,
            exact_merge=choice.float32,
        )

    def head_start(self, problem: AttentionProblem) -> int:
        """Query rows that may attend to the rank's own keys while the others are gathered."""
        return head_start(problem, self._ranks, self.costs(problem))

    @property
    def seconds(self) -> dict[str, float]:
        """GPU time so far: ``compute``, ``merge``, and ``exchange`` where kernels waited for it."""
        return self.clock.seconds()

    def describe(self) -> dict[str, str]:
        """The GPU, the libraries and the way of the messages."""
        return {"kernel": self._chooser.describe(), **self._facts}

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
        self.kernels.close()
        self._offsets.clear()
        self.memory.close()
        self.host.close()

    def abort(self) -> None:
        """Release what can be released at once, waiting for no other rank."""
        self._open = False
        self.kernels.abort()
        if self._nccl is not None:
            self._nccl.abort()
