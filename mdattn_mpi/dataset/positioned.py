"""Tensors at places in a file: reading and writing their bytes, all of them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mdattn_mpi.errors import OutputError
from mdattn_mpi.problem import Span

BLOCK_BYTES = 1 << 20  # read at once to be summed: it stays in the cache


@dataclass(frozen=True)
class Region:
    """A contiguous tensor in a file. Dims before its token dim are 1: a span is one run of bytes.

    ``token_dim`` is None where no dim counts tokens; every rank that reads it reads all of it.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    token_dim: int | None = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Where it ends in the file."""
        return self.offset + self.nbytes

    def part(self, spans: Sequence[Span]) -> tuple[int, ...]:
        """Return the shape of the tokens of `spans`, one span after the other.

        Raises
        ------
        ValueError
            Some of them aren't here.

        """
        if self.token_dim is None:
            return self.shape
        for span in spans:
            if not 0 <= span.start <= span.stop <= self.shape[self.token_dim]:
                raise ValueError(f"{span} is not within {self.shape[self.token_dim]}")
        tokens = sum(len(span) for span in spans)
        return (*self.shape[: self.token_dim], tokens, *self.shape[self.token_dim + 1 :])

    def runs(self, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """Say where the tokens of `spans` lie: ``(offset in the file, bytes)`` of each."""
        if self.token_dim is None:
            return [(self.offset, self.nbytes)]
        token = prod(self.shape[self.token_dim + 1 :]) * self.dtype.itemsize
        return [(self.offset + span.start * token, len(span) * token) for span in spans]

    def read(self, fd: int, spans: Sequence[Span], array: np.ndarray[Any, Any]) -> None:
        """Fill a contiguous `array` with the tokens of `spans`.

        Raises
        ------
        OSError
            The file ends before, or can't be read.

        """
        raw, done = array.reshape(-1).view(np.uint8), 0
        for offset, nbytes in self.runs(spans):
            read_exactly(fd, offset, raw[done : done + nbytes])
            done += nbytes


def checksum(fd: int, offset: int, nbytes: int, crc32: int = 0) -> int:
    """Compute the CRC-32 of a run of bytes, as if it followed those that gave `crc32`.

    Raises
    ------
    OSError
        The file ends before, or can't be read.

    """
    for start in range(0, nbytes, BLOCK_BYTES):
        block = np.empty(min(BLOCK_BYTES, nbytes - start), np.uint8)
        read_exactly(fd, offset + start, block)
        crc32 = zlib.crc32(block.data, crc32)
    return crc32


@contextmanager
def writing(what: str, path: str, item: str = "") -> Iterator[None]:
    """Say what can't be written, where the system only says why.

    Raises
    ------
    OutputError
        The disk is full, or failed.

    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{what} can't be written: {error.strerror or error}",
            fix="free some space or repair the filesystem, then run the same command again",
            file=path,
            item=item,
        ) from error


def read_exactly(fd: int, offset: int, array: np.ndarray[Any, Any]) -> None:
    """Fill a contiguous array from a file; `os.preadv` alone may stop short.

    Raises
    ------
    OSError
        The file ends before, or can't be read.

    """
    buffer = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}: it was cut while open")
        done += count


def write_exactly(fd: int, offset: int, data: Any) -> None:
    """Write a buffer of bytes to a file; `os.pwrite` alone may stop short.

    Raises
    ------
    OSError
        The disk is full, or failed.

    """
    buffer = memoryview(data)
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done:], offset + done)
