"""Device memory in order of streams, arrays in it, and host memory that copies can use.

Memory is cut from a few large blocks, for only whole blocks can be shown to another process. A
piece that is given back carries its fence: what has to be over before it may be written again. So
nothing waits on the host, and memory goes from one item to the next while the first still computes.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import count
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.gpu import Gpu
from mdattn_mpi.devices.cuda.order import Fence, Queue, extend, latest
from mdattn_mpi.errors import DeviceError

ALIGNMENT = 512
BLOCK = 1 << 28  # the least that is taken from the driver at a time
HOST_ALIGNMENT = 4096
SIMILAR = 1.25  # times the size of an array, at most, that a piece for it may have
LOOSE = 16  # times the size of an array, at most, that pinned memory for it may have


@dataclass(frozen=True)
class BlockRange:
    """A run of bytes in a block."""

    block: int
    start: int
    stop: int


class _Spare(NamedTuple):
    """A piece that was given back; `turn` grows from one to the next."""

    piece: BlockRange
    fence: Fence
    turn: int


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
        See `gpu.Gpu`.

    Attributes
    ----------
    blocks
        The address of every block.
    peak
        Bytes of all arrays, at most so far.

    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.blocks: list[int] = []
        self._sizes: list[int] = []
        self._holes: list[list[_Hole]] = []
        # What was given back last, by size: items of nearly the same shape take it as it is.
        self._spare: dict[int, deque[_Spare]] = {}
        self._turns = count()
        # What destructors gave back, whichever thread they ran in and whatever it was doing.
        self._returned: deque[tuple[BlockRange, Fence]] = deque()
        self._in_use = 0
        self.peak = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """An array with undefined contents, which gives its memory back when it is garbage."""
        piece, fence = self.cut(prod(shape) * dtype.itemsize)
        allocation = Allocation(
            self.blocks[piece.block] + piece.start, piece, fence, self.give_back
        )
        return DeviceArray(allocation, shape, dtype)

    @property
    def in_use(self) -> int:
        """Bytes of all arrays now."""
        self._take_back()
        return self._in_use

    def cut(self, nbytes: int) -> tuple[BlockRange, Fence]:
        """Cut out a piece; it may be written once its fence has been passed.

        What was given back longest ago goes first: what still uses it, if anything, ends soonest.
        What is still on its way to the host, over a link slower than any other, goes only where
        the driver has no more: an item would wait for the one before it to have left.

        Raises
        ------
        DeviceError
            The GPU has no memory for it.

        """
        self._take_back()
        size = self.size_of(nbytes)
        piece, fence = self._take_spare(size) or self._cut_hole(size)
        self._in_use += piece.stop - piece.start
        self.peak = max(self.peak, self._in_use)
        return piece, fence

    def size_of(self, nbytes: int) -> int:
        """Count the bytes of a piece that holds `nbytes`."""
        return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT

    def give_back(self, piece: BlockRange, fence: Fence) -> None:
        """Let a piece be used again after `fence`; a destructor may call, in any thread."""
        self._returned.append((piece, fence))

    def _take_back(self) -> None:
        while self._returned:
            piece, fence = self._returned.popleft()
            size = piece.stop - piece.start
            self._in_use -= size
            spare = _Spare(piece, fence, next(self._turns))
            self._spare.setdefault(size, deque()).append(spare)

    def _take_spare(self, size: int) -> tuple[BlockRange, Fence] | None:
        similar = (spares for n, spares in self._spare.items() if size <= n <= SIMILAR * size)
        oldest = [spare for spares in similar if (spare := _first_to_take(spares))]
        if not oldest:
            return None
        spare = min(oldest, key=lambda each: each.turn)
        self._spare[spare.piece.stop - spare.piece.start].remove(spare)
        return spare.piece, spare.fence

    def _cut_hole(self, size: int) -> tuple[BlockRange, Fence]:
        found = self._smallest_hole(size)
        if found is None and self._spare:
            self._fill_holes()
            found = self._smallest_hole(size)
        if found is None:
            if not self._grow(size):
                self._fill_holes(leaving=True)
            found = self._smallest_hole(size)
        if found is None:
            raise self._nothing_left(size)
        block, hole = found
        piece = BlockRange(block, hole.start, hole.start + size)
        hole.start += size
        if hole.start == hole.stop:
            self._holes[block].remove(hole)
        return piece, hole.fence

    def _fill_holes(self, *, leaving: bool = False) -> None:
        """Join what was given back to its neighbours; with `leaving`, all of it."""
        for size, spares in list(self._spare.items()):
            for spare in list(spares):
                if leaving or not _is_leaving(spare.fence):
                    self._join(spare.piece, spare.fence)
                    spares.remove(spare)
            if not spares:
                del self._spare[size]

    def _join(self, piece: BlockRange, fence: Fence) -> None:
        holes = self._holes[piece.block]
        index = sum(hole.start < piece.start for hole in holes)
        start, stop = piece.start, piece.stop
        if index < len(holes) and holes[index].start == stop:
            after = holes.pop(index)
            stop, fence = after.stop, latest(fence, after.fence)
        if index and holes[index - 1].stop == start:
            before = holes.pop(index - 1)
            start, fence = before.start, latest(before.fence, fence)
            index -= 1
        holes.insert(index, _Hole(start, stop, fence))

    def close(self) -> None:
        """Give everything back to the driver."""
        for address in self.blocks:
            self._gpu.release(address)
        self.blocks, self._sizes, self._holes, self._spare = [], [], [], {}
        self._returned.clear()

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

    def _grow(self, size: int) -> bool:
        # Each block as large as all before it: few blocks, and at most half of them unused.
        for ask in (max(size, BLOCK, sum(self._sizes) // 2), size):
            address = self._gpu.allocate(ask)
            if address:
                self.blocks.append(address)
                self._sizes.append(ask)
                self._holes.append([_Hole(0, ask, {})])
                return True
        return False

    def _nothing_left(self, size: int) -> DeviceError:
        gib = 2**30
        return DeviceError(
            f"out of GPU memory: {size / gib:.3g} GiB more were needed, "
            f"{self._gpu.available() / gib:.3g} GiB are free, "
            f"{self._in_use / gib:.3g} GiB hold arrays of this rank",
            fix="use more ranks, or -s ring, which holds 1/P of K and V",
        )


def _first_to_take(spares: Iterable[_Spare]) -> _Spare | None:
    """Find what was given back first and isn't on its way to the host."""
    return next((spare for spare in spares if not _is_leaving(spare.fence)), None)


def _is_leaving(fence: Fence) -> bool:
    """Whether it has to be waited for what is on its way to the host."""
    return any(queue.leaves and not queue.is_past(count) for queue, count in fence.items())


class Allocation:
    """A piece of device memory, and what comes before anything else may be done to it.

    Attributes
    ----------
    address
        Where it begins.
    piece
        Which piece of `Memory`; None where it belongs to another library.
    written
        What comes before it is read.
    used
        What comes before it is written: the same, and its readers, and its earlier life.
    consumers
        The streams of other libraries that use it, as long as they have it.

    """

    def __init__(
        self,
        address: int,
        piece: BlockRange | None = None,
        used: Fence | None = None,
        release: Callable[[BlockRange, Fence], None] | None = None,
        owner: Any = None,
    ) -> None:
        self.address = address
        self.piece = piece
        self.written: Fence = {}
        self.used: Fence = dict(used or {})
        self.consumers: list[Queue] = []
        self._release = release
        self._owner = owner

    def wrote(self, fence: Fence) -> None:
        """Say what has written it, in part or all of it."""
        extend(self.written, fence)
        extend(self.used, fence)

    def read(self, fence: Fence) -> None:
        """Say what has read it."""
        extend(self.used, fence)

    def __del__(self) -> None:
        # Nothing is asked of the driver here: this may run in any thread, and anywhere in it.
        if self._release and self.piece:
            for consumer in self.consumers:
                extend(self.used, consumer.advance())
            self._release(self.piece, self.used)


class DeviceArray:
    """A strided array on the GPU, in elements; slicing makes views."""

    __slots__ = ("address", "allocation", "dtype", "nbytes", "shape", "size", "strides")

    def __init__(
        self,
        allocation: Allocation,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> None:
        self.allocation = allocation
        self.shape = shape
        self.dtype = dtype
        self.strides = contiguous_strides(shape) if strides is None else strides
        self.address = allocation.address + offset  # of the first element; offset in bytes
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
        shape, offset = list(self.shape), self.address - self.allocation.address
        for dim, part in enumerate(slices):
            start, stop, step = part.indices(self.shape[dim])
            if step != 1:
                raise IndexError(f"a step of {step} in a slice of a device array")
            shape[dim] = max(0, stop - start)
            offset += start * self.strides[dim] * self.dtype.itemsize
        return DeviceArray(self.allocation, tuple(shape), self.dtype, self.strides, offset)

    def rows(self) -> tuple[int, int, int] | None:
        """Return runs, bytes a run, and bytes from run to run; None if they aren't spaced alike."""
        item = self.dtype.itemsize
        run, dim = 1, len(self.shape)
        while dim and (self.shape[dim - 1] == 1 or self.strides[dim - 1] == run):
            run *= self.shape[dim - 1]
            dim -= 1
        if dim == 0:
            return 1, run * item, run * item
        if prod(self.shape[: dim - 1]) == 1:
            return self.shape[dim - 1], run * item, self.strides[dim - 1] * item
        return None


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
    """Pinned host memory, kept for the next array that fits into it and isn't much smaller.

    Taking it from the system costs milliseconds, so it is taken once: a job takes its largest items
    first. For the caller's thread alone; only what arrays give back comes from others.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._idle: dict[int, list[int]] = {}  # by size; new ones are added in `empty` alone
        self._closed = False

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with undefined contents; its memory comes back when it is garbage."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes == 0:
            return np.empty(shape, dtype)
        least = size_class(nbytes)
        fitting = [n for n, idle in self._idle.items() if idle and least <= n <= LOOSE * least]
        size = min(fitting, default=least)
        idle = self._idle.setdefault(size, [])
        address = idle.pop() if idle else self._gpu.pinned(size)
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
