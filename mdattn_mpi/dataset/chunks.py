"""Chunks of a dataset, read and decoded here rather than by HDF5.

HDF5 trusts a chunk to have the length that its header says once it is decoded, and reads beyond it
when it hasn't: a flipped bit ends the process. It also decodes on one thread of the process only,
while `zlib` works outside the interpreter's lock.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from mdattn_mpi.dataset.positioned import read_exactly

Array = np.ndarray[Any, np.dtype[Any]]

CHECKSUM_BYTES = 4  # that fletcher32 appends


@dataclass(frozen=True)
class Filter:
    """One step of a dataset's pipeline, in the order of writing."""

    code: int
    values: tuple[int, ...]
    name: str


DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3  # HDF5's numbers
DECODED_HERE = (DEFLATE, SHUFFLE, FLETCHER32)


CHUNK = np.dtype([("offset", "<u8"), ("size", "<u4"), ("mask", "<u4")])  # of a table of chunks


def read_chunks(
    table: Array,
    fd: int,
    chunk: Sequence[int],
    filters: Sequence[Filter],
    start: Sequence[int],
    out: Array,
) -> None:
    """Read the box of `out`'s shape that begins at `start`.

    Parameters
    ----------
    table
        Where the chunks are, of dtype `CHUNK` and the shape of their grid; ``mask`` has a bit for
        each filter that was left out.
    fd
        The file.
    chunk, filters
        As the dataset was made; every filter is one of `DECODED_HERE`.
    start
        Where the box begins in the dataset.
    out
        What to fill; any strides, of as many bytes an element as the file has.

    Raises
    ------
    ValueError
        A chunk is damaged.
    OSError
        The file ends before, or can't be read.

    """
    nbytes = prod(chunk) * out.itemsize
    for corner in _corners(chunk, start, out.shape):
        place = tuple(at // step for at, step in zip(corner, chunk, strict=True))
        offset, size, mask = table[place].item()
        if size > 2 * nbytes + 1024:
            raise ValueError(f"chunk {corner} claims {size} bytes at {offset}")
        raw = np.empty(size, np.uint8)
        read_exactly(fd, offset, raw)
        content = _decoded(raw, filters, mask, nbytes)
        block = content.view(out.dtype).reshape(chunk)
        source, target = [], []
        for at, step, first, count in zip(corner, chunk, start, out.shape, strict=True):
            low, high = max(at, first), min(at + step, first + count)
            source.append(slice(low - at, high - at))
            target.append(slice(low - first, high - first))
        out[tuple(target)] = block[tuple(source)]


def _corners(
    chunk: Sequence[int], start: Sequence[int], count: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Where the chunks begin that a box touches."""
    return product(
        *(
            range(first - first % step, first + extent, step)
            for step, first, extent in zip(chunk, start, count, strict=True)
        )
    )


def _decoded(raw: Array, filters: Sequence[Filter], mask: int, nbytes: int) -> Array:
    """Undo the filters, last one first, but for those that `mask` says were left out."""
    content = raw
    for position in reversed(range(len(filters))):
        if mask >> position & 1:
            continue
        step = filters[position]
        if step.code == DEFLATE:
            content = _inflated(content, nbytes + CHECKSUM_BYTES * len(filters))
        elif step.code == SHUFFLE:
            content = _unshuffled(content, step.values[0] if step.values else 2)
        else:
            content = _checked(content)
    if content.size != nbytes:
        raise ValueError(f"a chunk has {content.size} bytes rather than {nbytes}")
    return content


def _inflated(content: Array, limit: int) -> Array:
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(content.data, limit)
    except zlib.error as error:
        raise ValueError(f"a compressed chunk is damaged: {error}") from None
    if not inflate.eof:
        raise ValueError("a compressed chunk is damaged: it ends too late or too early")
    return np.frombuffer(data, np.uint8)


def _unshuffled(content: Array, itemsize: int) -> Array:
    """Put bytes together that the filter has sorted by their place in a number."""
    count = content.size // itemsize if itemsize else 0
    if count < 2 or itemsize < 2:
        return content
    sorted_bytes = content[: count * itemsize].reshape(itemsize, count)
    rest = content[count * itemsize :]
    return np.concatenate([sorted_bytes.T.reshape(-1), rest])


def _checked(content: Array) -> Array:
    """Compare with the Fletcher checksum at the end, and take that off."""
    if content.size < CHECKSUM_BYTES:
        raise ValueError("a chunk is too short for its checksum")
    data, end = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    noted = end.view("<u2") if end.flags.aligned else end.copy().view("<u2")
    words = np.zeros((data.size + 1) // 2, ">u2")
    words.view(np.uint8)[: data.size] = data
    weights = np.arange(words.size, 0, -1, dtype=np.uint64) % 65535
    first = int(words.sum(dtype=np.uint64)) % 65535
    second = int((weights * words).sum(dtype=np.uint64)) % 65535
    for seen in (noted, noted.byteswap()):  # old HDF5 wrote it in the other byte order
        if int(seen[0]) % 65535 == first and int(seen[1]) % 65535 == second:
            return data
    raise ValueError("a chunk doesn't match its checksum")
