"""Running a strategy on streams that note what they are given, instead of doing it.

A strategy sees a device as ever, with lanes and streams of its own, memory from an `Arena`, and
messages through `Windows`. What comes out are graphs: one, or two where what stands before the
strategy's ``yield`` is launched by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.devices.cuda.arena import Arena, Holding
from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.gpu import Gpu, Graph
from mdattn_mpi.devices.cuda.memory import Allocation, DeviceArray
from mdattn_mpi.devices.cuda.order import Fence, Queue
from mdattn_mpi.devices.cuda.windows import Route, Windows
from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.problem import Plan

BYTE = np.dtype(np.uint8)


class Layout(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, array: DeviceArray) -> Layout:
        """The layout of `array`."""
        return cls(array.shape, array.dtype)

    def at(self, address: int) -> DeviceArray:
        """An array of this layout, kept by somebody else."""
        return DeviceArray(Allocation(address), *self)


@dataclass(frozen=True, eq=False)
class Work:
    """What is recorded: a strategy, and what it is called with.

    Parameters
    ----------
    attend, plan, options
        As in ``attend(device, plan, *inputs, **options)``.
    inputs
        The layouts of this rank's shards.
    ahead
        Whether what stands before the ``yield`` is a graph of its own.

    """

    attend: Callable[..., Any]
    plan: Plan
    options: Mapping[str, Any]
    inputs: tuple[Layout, ...]
    ahead: bool


class Result(NamedTuple):
    """An array that a strategy returned: its number among those it asked for; −1: part of one."""

    layout: Layout
    address: int
    number: int


@dataclass(eq=False)
class Frame:
    """Memory and flags in which one call at a time is replayed, on this rank and its peers.

    `kept` are arrays outside of it that its graphs read, by address.
    """

    route: Route
    holding: Holding = field(default_factory=Holding)
    results: tuple[Result, ...] = ()
    kept: dict[int, DeviceArray] = field(default_factory=dict)
    idle: Fence = field(default_factory=dict)  # what comes before it is used again


class Recorder:
    """Records work on one GPU.

    Parameters
    ----------
    gpu
        See `gpu.Gpu`.
    device
        A device on `arena` and `windows`.

    """

    def __init__(self, gpu: Gpu, device: CudaDevice, arena: Arena, windows: Windows) -> None:
        self._gpu, self._device, self._arena, self.windows = gpu, device, arena, windows
        self._origin = Queue(gpu, gpu.stream())
        self._queues = device.queues
        for queue in (self._origin, *self._queues):
            queue.captured = True

    def record(self, frame: Frame, work: Work, given: Mapping[int, int]) -> tuple[Graph, ...]:
        """Record `work` in a frame; the arrays of the numbers in `given` lie at its addresses.

        The first of all arrays are the inputs.

        Raises
        ------
        MdattnError
            It can't be recorded.

        """
        self._device.kernels.let_go()
        self._arena.start(frame.holding, given)
        self.windows.start(frame.route)
        inputs = [self._arena.empty(*layout) for layout in work.inputs]
        graphs: list[Graph] = []
        self._begin()
        try:
            steps = work.attend(self._device, work.plan, *inputs, **work.options)
            next(steps)
            if work.ahead:
                self.windows.settle()
                graphs.append(self._end())
                self._begin()
            arrays = run_to_end(steps)
            graphs.append(self._end())
        except BaseException:
            self._give_up(graphs)
            raise
        frame.kept |= {array.address: array for array in self._device.kernels.borrowed}
        if not frame.results:
            frame.results = tuple(
                Result(Layout.of(each), each.address, self._arena.number_of(each))
                for each in arrays
            )
        return tuple(graphs)

    def destroy(self, graphs: Sequence[Graph]) -> None:
        """Forget graphs that aren't under way."""
        for graph in graphs:
            self._gpu.destroy(graph)

    def release(self, frame: Frame) -> None:
        """Give back the memory of a frame."""
        self._arena.release(frame.holding, frame.idle)
        frame.route.flags.allocation.read(frame.idle)

    def _begin(self) -> None:
        """Fork all streams from one."""
        for queue in (self._origin, *self._queues):
            queue.forget()
        self._origin.enqueue(self._gpu.begin_capture)
        for queue in self._queues:
            queue.wait(self._origin.now)

    def _end(self) -> Graph:
        """Join all streams; return what they were given."""
        self._origin.wait(*(queue.now for queue in self._queues))
        return self._origin.enqueue(self._gpu.end_capture)

    def _give_up(self, graphs: Sequence[Graph]) -> None:
        with suppress(Exception):  # what was wrong is being raised already
            self._gpu.destroy(self._end())
        self.destroy(graphs)
