"""Reading a dataset by shards.

A child process, of this rank or of another, has looked at every selected item once: names, links,
shapes, dtypes, storage. Contiguous data is read with one `os.preadv` per span straight into the
caller's array; chunks are read and decoded here; what is left is read by the child, with the file's
own type, so that nothing is converted.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from mdattn_mpi.dataset.hdf5 import File, must_be_regular
from mdattn_mpi.dataset.index import Entry, TensorData, find_entries, first_of, patterns_of
from mdattn_mpi.dataset.layout import LAYOUTS, TENSORS, Item, Tensor, natural_order
from mdattn_mpi.dataset.positioned import read_exactly
from mdattn_mpi.dataset.scanner import scan
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import Span, digest_of

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 4096  # blocks of the content that go into a digest, over all items
SAMPLE_BYTES = 4096
SCRATCH_BYTES = 1 << 20
MANY_HEADS = 128  # more than that, and more than tokens, may be tokens


class Dataset:
    """An open dataset. `read` may be called from several threads.

    Attributes
    ----------
    path, size
        The file, and its bytes.
    items
        The selected items that can be done, in natural order of their names.
    faults
        The selected items that can't be; empty unless `open_dataset` was told to keep them.
    warnings
        What costs time or may be a mistake, one sentence each.

    """

    def __init__(self, file: File, entries: Sequence[Entry], faults: Sequence[RejectedError]):
        ordered = sorted(entries, key=lambda entry: natural_order(entry.name))
        self._file = file
        self.path = file.path
        self.size = file.size
        self.items = tuple(
            Item(entry.name, index, entry.problem) for index, entry in enumerate(ordered)
        )
        self.faults = tuple(faults)
        self._tensors = {entry.name: entry.tensors for entry in ordered}
        self.warnings = tuple(self._warnings())
        file.release()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def tensor(self, item: Item, tensor: Tensor) -> TensorData:
        """Describe one tensor of an item."""
        return self._tensors[item.name][tensor]

    def describe(self, item: Item) -> str:
        """Say an item's shape as it was understood, in one sentence."""
        layout = self._tensors[item.name]["key"].layout
        return f"{item.problem}, {layout.replace('_', '-')}"

    def read(
        self,
        item: Item,
        tensor: Tensor,
        spans: Sequence[Span],
        heads: Span | None = None,
        out: Array | None = None,
    ) -> Array:
        """Read the tokens of `spans`, one span after the other.

        Parameters
        ----------
        item, tensor
            What to read: one of `items`; ``query``, ``key`` or ``value``.
        spans
            Runs of tokens.
        heads
            A run of heads; all of them when left out.
        out
            A contiguous array ``[tokens, heads, head_dim]`` of the item's dtype to read into.

        Returns
        -------
        numpy.ndarray
            `out`, or a new array like it: token-major, whatever the layout in the file.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        data = self._tensors[item.name][tensor]
        heads = Span(0, data.heads) if heads is None else heads
        _check_runs(spans, data.tokens)
        _check_runs((heads,), data.heads)
        shape = (sum(len(span) for span in spans), len(heads), data.head_dim)
        if out is None:
            out = np.empty(shape, data.dtype)
        elif out.shape != shape or out.dtype != data.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype}{list(out.shape)}, want {data.dtype}{list(shape)}")
        bits = out.view(np.uint16)
        done = 0
        with _item_errors(data, item, tensor):
            for span in spans:
                _read_span(data, span, heads, bits[done : done + len(span)])
                done += len(span)
        return out

    def checksum(self, item: Item, tensor: Tensor) -> int | None:
        """CRC-32 over the whole dataset that holds the tensor; None when it isn't contiguous.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        data = self._tensors[item.name][tensor]
        if data.storage.offset is None:
            return None
        crc32 = 0
        for start in range(0, data.storage.nbytes, SCRATCH_BYTES):
            block = np.empty(min(SCRATCH_BYTES, data.storage.nbytes - start), np.uint8)
            with _item_errors(data, item, tensor):
                read_exactly(data.node.file.fd, data.storage.offset + start, block)
            crc32 = zlib.crc32(block.data, crc32)
        return crc32

    @property
    def fingerprint(self) -> str:
        """SHA-256 over samples of the file, of which at most 1 MiB is read.

        Ranks compare it: those who see another file than the one that was looked at notice.
        """
        return self._file.fingerprint

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the items' layout and samples of their content, whatever the path.

        At most `SAMPLES` blocks of the whole file are read: a change of a few numbers in a large
        file may go unseen, a changed file of the same shapes won't.
        """
        digest = hashlib.sha256()
        tensors = [
            (item, name, self._tensors[item.name][name]) for item in self.items for name in TENSORS
        ]
        problems = {item.problem: digest_of(asdict(item.problem)) for item in self.items}
        every = -(-len(tensors) // SAMPLES)
        blocks = max(1, SAMPLES // max(1, len(tensors)))
        for number, (item, name, data) in enumerate(tensors):
            facts = [item.name, problems[item.problem], name, data.layout, data.crc32]
            digest.update(json.dumps(facts).encode())
            if number % every == 0:
                for span in _sample_spans(data, blocks):
                    digest.update(self.read(item, name, (span,)).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, str | int]:
        """What an output remembers of its input."""
        return {
            "input_path": os.path.realpath(self.path),
            "input_size": self.size,
            "input_digest": self.digest,
        }

    def _all_tensors(self) -> list[TensorData]:
        return [data for found in self._tensors.values() for data in found.values()]

    def _warnings(self) -> list[str]:
        tensors = self._all_tensors()
        swapped = sum(data.layout == "head_major" for data in tensors)
        indirect = [data for data in tensors if data.offset is None]
        warnings = [*_crowded(self.items, self._tensors)]
        if swapped:
            warnings.append(
                f"{swapped} of {len(tensors)} tensors are head-major: a shard is then one run a "
                "head and has to be transposed, several times slower than token-major; "
                "`mdattn convert` rewrites them"
            )
        if indirect:
            warnings.append(
                f"{len(indirect)} of {len(tensors)} tensors aren't contiguous "
                f"({indirect[0].storage}): "
                "they are decoded while they are read; `mdattn convert` rewrites them"
            )
        return warnings


def scan_file(path: str, *, select: str = "*", allow: Sequence[str] = ()) -> bytes:
    """Have a child process look at a dataset or an output.

    Returns
    -------
    bytes
        A catalog: with it, the same file can be opened on any rank, and needn't be looked at there.

    Raises
    ------
    RejectedError
        No such file, not HDF5, truncated, damaged.

    """
    must_be_regular(path)
    return scan(path, allow, select=patterns_of(select))


def open_dataset(
    path: str | os.PathLike[str],
    *,
    select: str = "*",
    layout: str = "auto",
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep_faults: bool = False,
    catalog: bytes | None = None,
) -> Dataset:
    """Open a dataset and look at every selected item.

    Parameters
    ----------
    path
        The file.
    select
        Names or globs, separated by commas; the name of a batch means all its entries. What no
        pattern matches isn't looked at.
    layout
        ``token_major`` or ``head_major`` overrules what the file says; ``auto`` doesn't.
    allow
        Folders that links in the file may lead to.
    ignore
        Names of attributes and datasets that the format doesn't know and that don't matter.
    keep_faults
        Put items that can't be done into `Dataset.faults` rather than raise the first.
    catalog
        What `scan_file` returned for the same file on another rank; left out, the file is looked
        at here.

    Raises
    ------
    RejectedError
        The file, or one of the selected items, is not as the format says.

    """
    if layout not in ("auto", *LAYOUTS):
        raise RejectedError(f"layout is {layout!r}", fix=f"use auto, {' or '.join(LAYOUTS)}")
    patterns = patterns_of(select)
    with _no_garbage():
        file = File(path, allow, select=patterns, catalog=catalog)
        try:
            found, faults = find_entries(file, patterns, layout, ignore)
            if not keep_faults and faults:
                raise first_of(faults)
            return Dataset(file, found, faults)
        except BaseException:
            file.close()
            raise


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Look for no cycles among many new objects, which takes as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _crowded(
    items: Sequence[Item], tensors: Mapping[str, Mapping[Tensor, TensorData]]
) -> list[str]:
    """Warn of token-major items with so many heads that these may be the tokens."""
    found = [
        item
        for item in items
        for tensor in (tensors[item.name]["query"], tensors[item.name]["key"])
        if tensor.layout == "token_major" and tensor.heads > max(MANY_HEADS, tensor.tokens)
    ]
    if not found:
        return []
    return [
        f"item {found[0].name!r} has more heads than tokens: {found[0].problem}. If it is stored "
        "by heads, add --layout head_major; `mdattn convert` with --layout settles it"
    ]


@contextmanager
def _item_errors(data: TensorData, item: Item, tensor: Tensor) -> Iterator[None]:
    """Say of which item it is that something can't be read."""
    try:
        yield
    except Exception as error:
        raise ItemError(
            f"{tensor} can't be read ({error})",
            fix="check the file with `mdattn inspect --check`; copy it again",
            file=data.node.file.path,
            item=item.name,
        ) from error


def _check_runs(spans: Sequence[Span], length: int) -> None:
    for span in spans:
        if not 0 <= span.start <= span.stop <= length:
            raise ValueError(f"{span} is not within {length}")


def _read_span(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Read one run of tokens into `bits`, ``[tokens, heads, head_dim]`` of uint16."""
    if bits.size == 0:
        return
    if data.offset is None:
        _read_box(data, span, heads, bits)
    elif data.layout == "head_major":
        _read_by_head(data, span, heads, bits)
    elif len(heads) < data.heads:
        _read_some_heads(data, span, heads, bits)
    else:
        start = data.offset + span.start * data.token_bytes
        read_exactly(data.node.file.fd, start, bits)


def _read_some_heads(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Read whole tokens by blocks and keep some heads: faster than one read a token."""
    assert data.offset is not None
    step = max(1, SCRATCH_BYTES // data.token_bytes)
    scratch = np.empty((min(step, len(span)), data.heads, data.head_dim), np.uint16)
    for first in range(0, len(span), step):
        part = scratch[: min(step, len(span) - first)]
        start = data.offset + (span.start + first) * data.token_bytes
        read_exactly(data.node.file.fd, start, part)
        bits[first : first + len(part)] = part[:, heads.slice]


def _read_by_head(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Read one run a head and interleave them."""
    assert data.offset is not None
    row = data.head_dim * 2
    step = max(1, SCRATCH_BYTES // row)
    scratch = np.empty((min(step, len(span)), data.head_dim), np.uint16)
    for column, head in enumerate(range(heads.start, heads.stop)):
        for first in range(0, len(span), step):
            part = scratch[: min(step, len(span) - first)]
            start = data.offset + (head * data.tokens + span.start + first) * row
            read_exactly(data.node.file.fd, start, part)
            bits[first : first + len(part), column] = part


def _read_box(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Read what isn't contiguous: as a box of the dataset, whose dims may be in another order."""
    target = bits if data.layout == "token_major" else bits.swapaxes(0, 1)
    first = (span.start, heads.start) if data.layout == "token_major" else (heads.start, span.start)
    start: tuple[int, ...] = (*first, 0)
    if data.position is not None:
        start, target = (data.position, *start), target[np.newaxis]
    data.node.read_box(data.storage, start, target)


def _sample_spans(data: TensorData, blocks: int) -> list[Span]:
    """Choose runs of tokens all over a tensor; only its ends where reading is dear."""
    size = max(1, SAMPLE_BYTES // data.token_bytes)
    if data.offset is None:
        size, blocks = 1, 2
    if blocks * size >= data.tokens:
        return [Span(0, data.tokens)]
    last = data.tokens - size
    starts = {last * block // max(1, blocks - 1) for block in range(blocks)}
    return [Span(start, start + size) for start in sorted(starts)]
