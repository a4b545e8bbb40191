"""Device memory in order of streams, arrays in it, and host memory that copies can use.

Memory is cut from a few large blocks, for only whole blocks can be shown to another process. A
piece that is given back carries its fence: the events after which it may be written again. So
nothing waits on the host, and memory goes from one item to the next while the first still computes.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.errors import DeviceError

ALIGNMENT = 512
BLOCK = 1 << 28  # the least that is taken from the driver at a time
HOST_ALIGNMENT = 4096

Fence = tuple[Any, ...]


def pending(events: Sequence[Any]) -> Fence:
    """Leave out what has happened, and all but the last of each stream: it comes after the rest."""
    if not events:
        return ()
    last: dict[int, Any] = {}
    for event in events:
        other = last.get(event.stream)
        if other is None or event.number > other.number:
            last[event.stream] = event
    return tuple([event for event in last.values() if not event.is_done])


@dataclass(frozen=True)
class Place:
    """A run of bytes in a block."""

    block: int
    start: int
    stop: int


@dataclass
class _Hole:
    start: int
    stop: int
    fence: Fence


class Memory:
    """The device memory of one rank.

    Parameters
    ----------
    gpu
        The driver; see `driver.Gpu`.

    Attributes
    ----------
    blocks
        The address of every block.
    in_use, peak
        Bytes of all arrays now, and at most so far.

    """

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self.blocks: list[int] = []
        self._sizes: list[int] = []
        self._holes: list[list[_Hole]] = []
        # What was given back last, by size: items of one shape take it as it is.
        self._spare: dict[int, list[tuple[Place, Fence]]] = {}
        self.in_use = 0
        self.peak = 0

    def take(self, nbytes: int) -> tuple[Place, Fence]:
        """Cut out a piece; it may be written once its fence has been passed.

        Raises
        ------
        DeviceError
            The GPU has no memory for it.

        """
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        spare = self._spare.get(size)
        # The longest idle first: what still uses it, if anything, ends soonest.
        piece = spare.pop(0) if spare else self._cut(size)
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        return piece

    def give_back(self, place: Place, fence: Fence) -> None:
        """Let a piece be used again after `fence`."""
        size = place.stop - place.start
        self.in_use -= size
        self._spare.setdefault(size, []).append((place, fence))

    def _cut(self, size: int) -> tuple[Place, Fence]:
        found = self._smallest_hole(size)
        if found is None and self._spare:
            self._fill_holes()
            found = self._smallest_hole(size)
        if found is None:
            self._grow(size)
            found = self._smallest_hole(size)
            assert found is not None
        block, hole = found
        place = Place(block, hole.start, hole.start + size)
        hole.start += size
        if hole.start == hole.stop:
            self._holes[block].remove(hole)
        return place, hole.fence

    def _fill_holes(self) -> None:
        """Join all that was given back to its neighbours."""
        for places in self._spare.values():
            for place, fence in places:
                self._join(place, fence)
        self._spare.clear()

    def _join(self, place: Place, fence: Fence) -> None:
        holes = self._holes[place.block]
        index = sum(hole.start < place.start for hole in holes)
        start, stop = place.start, place.stop
        if index < len(holes) and holes[index].start == stop:
            after = holes.pop(index)
            stop, fence = after.stop, pending((*fence, *after.fence))
        if index and holes[index - 1].stop == start:
            before = holes.pop(index - 1)
            start, fence = before.start, pending((*before.fence, *fence))
            index -= 1
        holes.insert(index, _Hole(start, stop, fence))

    def address(self, place: Place) -> int:
        """Where a piece begins."""
        return self.blocks[place.block] + place.start

    def close(self) -> None:
        """Give everything back to the driver."""
        for address in self.blocks:
            self._gpu.release(address)
        self.blocks, self._sizes, self._holes, self._spare = [], [], [], {}

    def _smallest_hole(self, size: int) -> tuple[int, _Hole] | None:
        fitting = [
            (hole.stop - hole.start, block, hole)
            for block, holes in enumerate(self._holes)
            for hole in holes
            if hole.stop - hole.start >= size
        ]
        if not fitting:
            return None
        _, block, hole = min(fitting, key=lambda found: found[0])
        return block, hole

    def _grow(self, size: int) -> None:
        # Each block as large as all before it: few blocks, and at most half of them unused.
        for ask in (max(size, BLOCK, sum(self._sizes) // 2), size):
            address = self._gpu.allocate(ask)
            if address:
                self.blocks.append(address)
                self._sizes.append(ask)
                self._holes.append([_Hole(0, ask, ())])
                return
        gib = 2**30
        raise DeviceError(
            f"out of GPU memory: {size / gib:.3g} GiB more were needed, "
            f"{self._gpu.available() / gib:.3g} GiB are free, "
            f"{self.in_use / gib:.3g} GiB hold arrays of this rank",
            fix="use more ranks, or -s ring, which holds 1/P of K and V",
        )


class Storage:
    """A piece of device memory, and what has to happen before it is read, written or given back.

    Attributes
    ----------
    address
        Where it begins.
    place
        Which piece of `Memory`; None where it belongs to somebody else.
    fence
        Events of its earlier use, to be passed before it is written.
    written
        Events of copies that write it, to be passed before it is read.
    busy
        Events of copies that read it, to be passed before it is written again.
    unseen
        Those of `fence` and `written` that kernels haven't been made to wait for.
    by_kernels, touched
        Whether kernels write it, or use it at all: then the order of their streams counts too.

    """

    def __init__(
        self,
        address: int,
        place: Place | None = None,
        fence: Fence = (),
        release: Callable[[Storage], None] | None = None,
        owner: Any = None,
    ) -> None:
        self.address = address
        self.place = place
        self.fence = fence
        self.written: list[Any] = []
        self.busy: list[Any] = []
        self.unseen = list(fence)
        self.by_kernels = self.touched = place is None
        self._release = release
        self._owner = owner

    def arrive(self, event: Any) -> None:
        """Say that a copy writes it, done with `event`."""
        self.written.append(event)
        self.unseen.append(event)

    def __del__(self) -> None:
        if self._release:
            self._release(self)


class DeviceArray:
    """A strided array on the GPU, in elements; slicing makes views.

    Other libraries take it by DLPack or ``__cuda_array_interface__``.
    """

    __slots__ = ("address", "dtype", "nbytes", "shape", "size", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> None:
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self.strides = contiguous_strides(shape) if strides is None else strides
        self.address = storage.address + offset  # of the first element; offset in bytes
        self.size = prod(shape)
        self.nbytes = self.size * dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are one run in memory."""
        return is_one_run(self.shape, self.strides)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> DeviceArray:
        """Return a view; slices with step 1 only."""
        if index == slice(0, self.shape[0]):
            return self
        slices = index if isinstance(index, tuple) else (index,)
        shape, offset = list(self.shape), self.address - self.storage.address
        for dim, part in enumerate(slices):
            start, stop, step = part.indices(self.shape[dim])
            if step != 1:
                raise IndexError(f"a step of {step} in a slice of a device array")
            shape[dim] = max(0, stop - start)
            offset += start * self.strides[dim] * self.dtype.itemsize
        return DeviceArray(self.storage, tuple(shape), self.dtype, self.strides, offset)

    def rows(self) -> tuple[int, int, int]:
        """Return runs, bytes a run, and bytes from run to run.

        Raises
        ------
        ValueError
            The array is no set of equally spaced runs.

        """
        item = self.dtype.itemsize
        run, dim = 1, len(self.shape)
        while dim and (self.shape[dim - 1] == 1 or self.strides[dim - 1] == run):
            run *= self.shape[dim - 1]
            dim -= 1
        if dim == 0:
            return 1, run * item, run * item
        if prod(self.shape[: dim - 1]) == 1:
            return self.shape[dim - 1], run * item, self.strides[dim - 1] * item
        raise ValueError(f"strides {self.strides} of shape {self.shape} are no runs")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; no bfloat16, which has no type string."""
        if self.dtype.kind == "V":
            raise AttributeError("bfloat16 has no type string: use DLPack")
        return {
            "shape": self.shape,
            "strides": tuple(stride * self.dtype.itemsize for stride in self.strides),
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
        }


@cache
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of an array that is one run."""
    strides, run = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        strides[dim] = run
        run *= max(1, shape[dim])
    return tuple(strides)


@cache
def is_one_run(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements of an array lie one after the other."""
    wanted = contiguous_strides(shape)
    return strides == wanted or all(
        extent == 1 or stride == right
        for extent, stride, right in zip(shape, strides, wanted, strict=True)
    )


class HostBuffers:
    """Pinned host memory, kept for the next array of the same size class.

    Taking pinned memory from the system costs milliseconds, so it is taken once.
    """

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self._idle: defaultdict[int, list[int]] = defaultdict(list)
        self._closed = False

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with undefined contents; its memory comes back when it is garbage."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes == 0:
            return np.empty(shape, dtype)
        size = size_class(nbytes)
        try:
            address = self._idle[size].pop()
        except IndexError:
            address = self._gpu.pinned(size)
        owner = (ctypes.c_ubyte * nbytes).from_address(address)
        weakref.finalize(owner, self._give_back, size, address).atexit = False
        found: NDArray[Any] = np.frombuffer(memoryview(owner), np.uint8).view(dtype).reshape(shape)
        return found

    def close(self) -> None:
        """Give back what no array uses; the rest follows when its array is garbage."""
        self._closed = True
        for addresses in self._idle.values():
            while addresses:
                self._gpu.release_pinned(addresses.pop())

    def _give_back(self, size: int, address: int) -> None:
        if self._closed:
            self._gpu.release_pinned(address)
        else:
            self._idle[size].append(address)


def size_class(nbytes: int) -> int:
    """Round up by at most a quarter, so that arrays of nearly the same size share memory."""
    step = max(HOST_ALIGNMENT, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step
