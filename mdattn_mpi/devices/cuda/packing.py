"""Packed documents: blocks that one call of a kernel takes, and where each begins, on the GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mdattn_mpi.devices.cuda.attention import ONE, Documents
from mdattn_mpi.devices.cuda.gpu import Gpu
from mdattn_mpi.devices.cuda.memory import DeviceArray, Memory
from mdattn_mpi.devices.cuda.order import Queue
from mdattn_mpi.mask import FULL, Band, Span
from mdattn_mpi.partition import Block

MOST = 256  # lists of beginnings that are kept


class Run(NamedTuple):
    """Blocks whose rows, and whose keys, follow each other; `band` is right for each of them."""

    blocks: tuple[Block, ...]
    band: Band

    @property
    def q(self) -> Span:
        """All rows."""
        return Span(self.blocks[0].q.start, self.blocks[-1].q.stop)

    @property
    def kv(self) -> Span:
        """All keys."""
        return Span(self.blocks[0].kv.start, self.blocks[-1].kv.stop)

    @property
    def documents(self) -> Documents:
        """See `attention.AttentionCall`."""
        if len(self.blocks) == 1:
            return ONE
        rows = (block.q.stop - self.q.start for block in self.blocks)
        keys = (block.kv.stop - self.kv.start for block in self.blocks)
        return (0, *rows), (0, *keys)

    @property
    def alone(self) -> list[Run]:
        """A run for each block."""
        return [Run((block,), block.band) for block in self.blocks]


def runs(blocks: Sequence[Block]) -> Iterator[Run]:
    """Join blocks to runs, in order."""
    found: list[Block] = []
    band = FULL
    for block in blocks:
        both = _common_band(band, block.band)
        if not found:
            both = block.band
        elif not (
            (block.q.start, block.kv.start) == (found[-1].q.stop, found[-1].kv.stop)
            and _is_right(both, block)
            and (both == band or all(_is_right(both, each) for each in found))
        ):
            yield Run(tuple(found), band)
            found, both = [], block.band
        found.append(block)
        band = both
    if found:
        yield Run(tuple(found), band)


def _common_band(one: Band, other: Band) -> Band:
    """Return the bounds that either has."""
    return Band(*(b if a is None else a for a, b in zip(one, other, strict=True)))


def _is_right(band: Band, block: Block) -> bool:
    """Whether a block sees the same in `band` as in its own.

    Blocks have no bound where it would hide nothing, as in a document shorter than the window.
    """
    rows, keys = len(block.q), len(block.kv)
    return band == block.band or (
        rows <= keys
        and all(
            bound == own or (own is None and bound is not None and bound >= length - 1)
            for bound, own, length in zip(band, block.band, (keys, rows), strict=True)
        )
    )


class Offsets:
    """Where documents begin, as kernels read it: int32 in device memory.

    Parameters
    ----------
    gpu, memory
        The driver, and where the arrays lie.

    """

    def __init__(self, gpu: Gpu, memory: Memory) -> None:
        self._gpu, self._memory = gpu, memory
        self._queue = Queue(gpu, gpu.stream())
        self._kept: OrderedDict[tuple[int, ...], DeviceArray] = OrderedDict()

    def get(self, starts: tuple[int, ...]) -> DeviceArray:
        """Return an array of `starts`, written already: the one of the last time, if it is kept."""
        if starts not in self._kept:
            self._kept[starts] = self._upload(np.array(starts, np.int32))
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)
        self._kept.move_to_end(starts)
        return self._kept[starts]

    def clear(self) -> None:
        """Let go of all arrays."""
        self._kept.clear()

    def _upload(self, numbers: np.ndarray[tuple[int], np.dtype[np.int32]]) -> DeviceArray:
        array = self._memory.empty(numbers.shape, numbers.dtype)
        self._queue.wait(array.allocation.used)
        self._queue.enqueue(self._gpu.copy, array.address, numbers.ctypes.data, numbers.nbytes)
        self._queue.mark().sync()
        return array
