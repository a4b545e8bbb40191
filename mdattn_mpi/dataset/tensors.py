"""The tensors of a file's items: where each lies, and how some of its tokens are read.

What is contiguous is read with one `os.preadv` per span straight into the caller's array; chunks
are read and decoded here; what only HDF5 can read is read by the child process that looks at files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from mdattn_mpi.dataset.hdf5 import File, Node, Storage
from mdattn_mpi.dataset.layout import AnyItem, Layout
from mdattn_mpi.dataset.positioned import Region, checksum
from mdattn_mpi.dataset.seen import Seen
from mdattn_mpi.errors import ItemError
from mdattn_mpi.problem import Span, digest_of

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 4096  # blocks of the content that go into a digest, over all items
SAMPLE_BYTES = 4096
SCRATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorData:
    """One tensor of one item; `shape` and `dtype` are those of an array of all of it.

    `token_dim` is as in `Region`. Attention's tensors are ``[tokens, heads, head dim]``, whatever
    the layout in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    node: Node
    storage: Storage
    token_dim: int | None = 0
    layout: Layout = "token_major"
    position: int | None = None  # in the batch dim
    crc32: int | None = None  # of the whole dataset, where its writer has noted it

    @property
    def nbytes(self) -> int:
        """Bytes of this item's part."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def encoding(self) -> str:
        """How its BF16 is stored; empty where it is neither that nor FP16."""
        stored = self.storage.stored
        return "" if isinstance(stored, str) else stored.encoding

    @property
    def region(self) -> Region | None:
        """Where this item's part lies in the file; None when it isn't in one run."""
        if self.node.offset is None:
            return None
        offset = self.node.offset + (self.position or 0) * self.nbytes
        return Region(offset, self.shape, self.dtype, self.token_dim)

    def read(self, spans: Sequence[Span], out: Array) -> None:
        """Fill a contiguous `out` with the tokens of `spans`, one span after the other."""
        fd, region, done = self.node.file.fd, self.region, 0
        if region is not None and self.layout == "token_major":
            region.read(fd, spans, out)
            return
        for span in spans:
            if span and region is None:
                self._read_box(span, out[done : done + len(span)])
            elif region is not None:
                _read_by_head(fd, region, span, out[done : done + len(span)])
            done += len(span)

    def _read_box(self, span: Span, out: Array) -> None:
        """Read a box of the dataset, whose dims may be in another order."""
        start: tuple[int, ...] = (span.start, *(0 for _ in self.shape[1:]))
        if self.layout == "head_major":
            start, out = (0, span.start, 0), out.swapaxes(0, 1)
        if self.position is not None:
            start, out = (self.position, *start), out[np.newaxis]
        self.node.read_box(self.storage, start, out)

    def samples(self, blocks: int) -> Iterator[Array]:
        """Read runs of tokens all over the tensor; only its ends where reading is expensive."""
        if self.token_dim is None:  # any bytes will do
            whole = replace(self, shape=(self.nbytes,), dtype=np.dtype("u1"), token_dim=0)
            yield from whole.samples(blocks)
            return
        tokens = self.shape[self.token_dim]
        size = max(1, SAMPLE_BYTES * tokens // max(1, self.nbytes))
        if self.region is None:
            size, blocks = 1, 2
        size = tokens if blocks * size >= tokens else size
        last, parts = tokens - size, max(1, blocks - 1)
        for start in sorted({last * block // parts for block in range(blocks)}):
            rest = self.shape[self.token_dim + 1 :]
            out = np.empty((*self.shape[: self.token_dim], size, *rest), self.dtype)
            self.read((Span(start, start + size),), out)
            yield out


def _read_by_head(fd: int, region: Region, span: Span, out: Array) -> None:
    """Read one run a head and interleave them."""
    tokens, heads, dim = region.shape
    step = max(1, SCRATCH_BYTES // (dim * region.dtype.itemsize))
    scratch = np.empty((min(step, len(span)), dim), region.dtype)
    run = Region(region.offset, (tokens * heads, dim), region.dtype)
    for head in range(heads):
        for first in range(0, len(span), step):
            part = scratch[: min(step, len(span) - first)]
            start = head * tokens + span.start + first
            run.read(fd, (Span(start, start + len(part)),), part)
            out[first : first + len(part), head] = part


class TensorFile:
    """An open file of items with tensors, for reading; any thread may read.

    Attributes
    ----------
    path, size
        The file, and its bytes.
    items
        Those that are selected, in natural order of their names.
    warnings
        What costs time or may be a mistake, one sentence each.

    """

    def __init__(
        self,
        file: File,
        items: Sequence[AnyItem],
        tensors: Mapping[str, Mapping[Any, TensorData]],
    ) -> None:
        self._file = file
        self.path = file.path
        self.size = file.size
        self.items: tuple[AnyItem, ...] = tuple(items)
        self.warnings: tuple[str, ...] = ()
        self._tensors = tensors

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def tensor(self, item: AnyItem, tensor: str) -> TensorData:
        """Describe one tensor of an item."""
        return self._tensors[item.name][tensor]

    def tensors(self, item: AnyItem) -> Mapping[str, TensorData]:
        """Describe all tensors of an item, by name."""
        return self._tensors[item.name]

    def describe(self, item: AnyItem) -> str:
        """Say an item's shape as it was understood, in one sentence."""
        return str(item.problem)

    def read(
        self, item: AnyItem, tensor: str, spans: Sequence[Span], *, out: Array | None = None
    ) -> Array:
        """Read the tokens of `spans`, one span after the other; all of what has no token dim.

        Parameters
        ----------
        item, tensor
            What to read: one of `items`, and the name of one of its tensors.
        spans
            Runs of tokens.
        out
            A contiguous array to read into. Of attention, ``[tokens, heads, head_dim]`` of the
            item's dtype, whatever the layout in the file.

        Returns
        -------
        numpy.ndarray
            `out`, or a new array like it.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        data = self.tensor(item, tensor)
        shape = Region(0, data.shape, data.dtype, data.token_dim).part(spans)
        if out is None:
            out = np.empty(shape, data.dtype)
        elif out.shape != shape or out.dtype != data.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype}{list(out.shape)}, want {data.dtype}{list(shape)}")
        with self._reading(item, tensor):
            data.read(spans, out)
        return out

    @contextmanager
    def _reading(self, item: AnyItem, tensor: str) -> Iterator[None]:
        """Say of which item it is that something can't be read."""
        try:
            yield
        except Exception as error:
            raise ItemError(
                f"{tensor} can't be read ({error})",
                fix="check the file with `mdattn inspect --check`; copy it again",
                file=self.tensor(item, tensor).node.file.path,
                item=item.name,
            ) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 over samples of the file, of which at most 1 MiB is read.

        Ranks compare it, and so notice a file other than the one that was scanned.
        """
        return self._file.fingerprint

    @property
    def seen(self) -> Seen | None:
        """The file as it was opened; None where it leads to other files."""
        return self._file.seen

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the items' layout and samples of their content, whatever the path.

        At most `SAMPLES` blocks of the whole file are read: a change of a few numbers in a large
        file may go unseen, a changed file of the same shapes won't.
        """
        digest = hashlib.sha256()
        problems: dict[Any, int] = {}
        for item in self.items:
            if item.problem not in problems:
                problems[item.problem] = self._meaning(item)
        tensors = [
            (item, name, data)
            for item in self.items
            for name, data in self._tensors[item.name].items()
        ]
        every = -(-len(tensors) // SAMPLES)
        blocks = max(1, SAMPLES // max(1, len(tensors)))
        for number, (item, name, data) in enumerate(tensors):
            facts = [item.name, problems[item.problem], name, data.layout, data.crc32]
            digest.update(json.dumps(facts).encode())
            if number % every == 0:
                with self._reading(item, name):
                    for block in data.samples(blocks):
                        digest.update(block.view(np.uint8).data)
        return digest.hexdigest()

    def _meaning(self, item: AnyItem) -> int:
        """Say in bits what an item is, besides its tensors."""
        return digest_of(item.problem.facts())

    def checksum(self, item: AnyItem, tensor: str) -> int | None:
        """CRC-32 over the whole dataset that holds the tensor; None when it isn't contiguous.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        data = self.tensor(item, tensor)
        if data.node.offset is None:
            return None
        with self._reading(item, tensor):
            return checksum(data.node.file.fd, data.node.offset, data.storage.nbytes)

    @property
    def identity(self) -> dict[str, str | int]:
        """What an output remembers of its input."""
        return {
            "input_path": os.path.realpath(self.path),
            "input_size": self.size,
            "input_digest": self.digest,
        }
