"""An output that is being written or read: shards, checksums, ledger.

Opening it asks a scan for the offsets; from then on the file is bytes at known places, written by
`os.pwrite` from all ranks at once.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.hdf5 import File, Node, Value
from mdattn_mpi.dataset.index import check_format
from mdattn_mpi.dataset.layout import (
    ITEMS,
    LEDGER,
    OUTPUT_FORMAT,
    RANK_SPANS,
    REASON_BYTES,
    Item,
    item_name_fault,
    shown,
)
from mdattn_mpi.dataset.ledger import Ledger
from mdattn_mpi.dataset.positioned import read_exactly, write_exactly
from mdattn_mpi.dataset.reader import Dataset
from mdattn_mpi.errors import ItemError, OutputError, RejectedError
from mdattn_mpi.problem import AttentionProblem, Span

Array = np.ndarray[Any, np.dtype[Any]]
Result = Literal["output", "lse"]

# Options that a resumed job may change when its user says so.
CHANGEABLE = ("strategy", "backend", "ranks", "group_size", "transfer", "engine")
_ANEW = "start anew: --overwrite"
BLOCK_BYTES = 8 << 20  # checksum and write go over the same block while it is in the cache


@dataclass(frozen=True)
class Region:
    """An array at a place in the file. Dim 0 are tokens."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Where it ends in the file."""
        return self.offset + prod(self.shape) * self.dtype.itemsize

    def check(self, spans: Sequence[Span]) -> int:
        """Count the tokens of `spans`; all of them must be here."""
        for span in spans:
            if not 0 <= span.start <= span.stop <= self.shape[0]:
                raise ValueError(f"{span} is not within {self.shape[0]}")
        return sum(len(span) for span in spans)


class Output:
    """An open output. Several ranks and threads may use the same file, on spans of their own.

    Attributes
    ----------
    path
        The file.
    attributes
        Those of its root: provenance and options.
    items
        In the order of the ledger; ``item.index`` is the row.
    ledger
        Which of them are done.
    lse
        Whether it has room for the log-sum-exp.

    """

    def __init__(self, path: str, fd: int, attributes: Mapping[str, Value], contents: _Contents):
        self.path = path
        self.attributes = dict(attributes)
        self.items = contents.items
        self.ledger = contents.ledger
        self.lse = contents.lse
        self._fd = fd
        self._regions = contents.regions
        self._by_name = {item.name: item for item in self.items}

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, without a sync."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def item(self, name: str) -> Item:
        """Find an item by its name.

        Raises
        ------
        RejectedError
            There is none of that name.

        """
        if name not in self._by_name:
            raise RejectedError(
                "is not in this output", fix="see `mdattn inspect`", file=self.path, item=name
            )
        return self._by_name[name]

    def match(self, attributes: Mapping[str, Value]) -> dict[str, tuple[Value | None, Value]]:
        """List what differs from `attributes`: by name, what the output says and what was given."""
        return {
            name: (self.attributes.get(name), value)
            for name, value in attributes.items()
            if self.attributes.get(name) != value
        }

    def check_resume(
        self, dataset: Dataset, options: Mapping[str, Value], *, ranks: int, allow_change: bool
    ) -> None:
        """Make sure that going on with `dataset` and `options` gives what this output began.

        Raises
        ------
        RejectedError
            The input or the options changed; says which. `allow_change` admits the options in
            `CHANGEABLE`: they don't alter the meaning of the result, only its last bits.

        """
        now = {item.name: item.problem for item in dataset.items}
        if now != {item.name: item.problem for item in self.items}:
            raise self._changed(["its items, or their shapes, masks or scales, are others"])
        given = {**dataset.identity, **options, "ranks": ranks}
        for name in ("input_path", "items"):  # the file may have moved; items were compared above
            given.pop(name, None)
        changes = self.match(given)
        if any(name not in CHANGEABLE for name in changes) or (changes and not allow_change):
            raise self._changed(
                [
                    f"{name} was {_brief(old)}, is {_brief(new)}"
                    for name, (old, new) in changes.items()
                ],
                changeable=all(name in CHANGEABLE for name in changes),
            )

    def _changed(self, changes: Sequence[str], changeable: bool = False) -> RejectedError:
        allow = ", or go on all the same with --allow-change" if changeable else ""
        return RejectedError(
            f"belongs to another job: {'; '.join(changes)}",
            fix=f"run it as before, name another output, start anew with --overwrite{allow}",
            file=self.path,
        )

    def write(self, item: Item, spans: Sequence[Span], out: Array, lse: Array | None = None) -> int:
        """Write one rank's shard; `sync` makes it last.

        Parameters
        ----------
        item
            An item of this name.
        spans
            The rank's query tokens.
        out
            ``[tokens, Nq, Hv]`` in the item's dtype, the spans one after the other.
        lse
            ``[tokens, Nq]`` in float32; needed when the output has room for it.

        Returns
        -------
        int
            CRC-32 over the bytes of `out`, then those of `lse`.

        Raises
        ------
        OutputError
            The disk is full, or failed.

        """
        checksum = 0
        for result, array in self._results(item, spans, out, lse):
            region = self._region(item, result)
            done = 0
            for span in spans:
                part = array[done : done + len(span)].reshape(-1).view(np.uint8)
                start = region.offset + span.start * region.token_bytes
                checksum = self._write_block(item, start, part, checksum)
                done += len(span)
        return checksum

    def _results(
        self, item: Item, spans: Sequence[Span], out: Array, lse: Array | None
    ) -> list[tuple[Result, Array]]:
        """Pair what was given with what the file has room for; contiguous, and of its shape."""
        if self.lse and lse is None:
            raise ValueError(f"item {item.name!r}: this output has room for lse, none was given")
        given: list[tuple[Result, Array]] = [("output", out)]
        if self.lse and lse is not None:
            given.append(("lse", lse))
        for result, array in given:
            region = self._region(item, result)
            shape = (region.check(spans), *region.shape[1:])
            if array.shape != shape or array.dtype != region.dtype:
                raise ValueError(
                    f"item {item.name!r}: {result} is {array.dtype}{list(array.shape)}, "
                    f"want {region.dtype}{list(shape)}"
                )
        return [(result, np.ascontiguousarray(array)) for result, array in given]

    def _write_block(self, item: Item, offset: int, data: Array, checksum: int) -> int:
        try:
            for start in range(0, data.size, BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES].data
                checksum = zlib.crc32(block, checksum)
                write_exactly(self._fd, offset + start, block)
        except OSError as error:
            raise OutputError(
                f"can't be written: {error.strerror or error}",
                fix="free some space or mend the filesystem, then run the same command again",
                file=self.path,
                item=item.name,
            ) from error
        return checksum

    def read(self, item: Item, result: Result, spans: Sequence[Span] | None = None) -> Array:
        """Read the tokens of `spans` (all of them when left out), one span after the other.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        region = self._region(item, result)
        spans = (Span(0, region.shape[0]),) if spans is None else spans
        array = np.empty((region.check(spans), *region.shape[1:]), region.dtype)
        done = 0
        for span in spans:
            start = region.offset + span.start * region.token_bytes
            try:
                read_exactly(self._fd, start, array[done : done + len(span)])
            except OSError as error:
                raise ItemError(
                    f"{result} can't be read: {error.strerror or error}",
                    fix="restore the file, or start anew with --overwrite",
                    file=self.path,
                    item=item.name,
                ) from error
            done += len(span)
        return array

    def checksum(self, item: Item, spans: Sequence[Span]) -> int:
        """Compute from the file what `write` returned for the same spans."""
        checksum = 0
        for result in ("output", "lse") if self.lse else ("output",):
            region = self._region(item, result)
            step = max(1, BLOCK_BYTES // region.token_bytes)
            for span in spans:
                for start in range(span.start, span.stop, step):
                    run = Span(start, min(start + step, span.stop))
                    part = self.read(item, result, (run,))
                    checksum = zlib.crc32(part.reshape(-1).view(np.uint8).data, checksum)
        return checksum

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises
        ------
        OutputError
            The disk failed: what was written since the last sync may be lost.

        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise OutputError(
                f"can't be synced: {error.strerror or error}",
                fix="free some space or mend the filesystem, then run the same command again",
                file=self.path,
            ) from error

    def _region(self, item: Item, result: Result) -> Region:
        return self._regions[self.item(item.name).index][result]


def open_output(
    path: str | os.PathLike[str], writable: bool = False, *, catalog: bytes | None = None
) -> Output:
    """Open an output and check its structure.

    Parameters
    ----------
    path, writable
        The file, and whether shards will be written.
    catalog
        What `scan_file` returned for the same file on another rank; left out, it is looked at here.

    Raises
    ------
    RejectedError
        It isn't one, it is damaged, or it can't be opened for writing.

    """
    with File(path, catalog=catalog) as file:
        root = file.root
        check_format(root, OUTPUT_FORMAT)
        attributes = root.attributes()
        fd = _reopen(file, writable)
        try:
            return Output(file.path, fd, attributes, _contents(root, fd))
        except BaseException:
            os.close(fd)
            raise


def _brief(value: Value | None) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}…"


@dataclass(frozen=True)
class _Contents:
    items: tuple[Item, ...]
    regions: list[dict[Result, Region]]
    ledger: Ledger
    lse: bool


def _reopen(file: File, writable: bool) -> int:
    """Open the very file that was looked at, for writing too."""
    try:
        fd = os.open(file.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise file.reject(
            f"can't be opened for writing: {error.strerror}", "check who may write it"
        ) from error
    if not os.path.sameopenfile(fd, file.fd):
        os.close(fd)
        raise file.reject("was replaced while it was opened", "run the same command again")
    return fd


def _contents(root: Node, fd: int) -> _Contents:
    reject = root.file.reject
    group, book = root.child(ITEMS), root.child(LEDGER)
    if group is None or book is None:
        raise reject(f"has no group /{ITEMS} or no group /{LEDGER}", _ANEW)
    found = [_item(group, name) for name in group.names()]
    found.sort(key=lambda pair: pair[0].index)
    items = tuple(item for item, _ in found)
    regions = [results for _, results in found]
    if [item.index for item in items] != list(range(len(items))):
        raise reject("its items aren't numbered 0, 1, 2, …", _ANEW)
    if len({len(results) for results in regions}) > 1:
        raise reject("some of its items have an lse and some don't", _ANEW)
    ledger_regions = _ledger_regions(book, len(items))
    _check_apart(
        root, [*ledger_regions.values(), *(r for found in regions for r in found.values())]
    )
    ledger = Ledger(
        path=root.file.path,
        fd=fd,
        items=items,
        width=ledger_regions["crc32"].shape[1],
        offsets={name: region.offset for name, region in ledger_regions.items()},
    )
    return _Contents(items, regions, ledger, any(len(results) == 2 for results in regions))


def _item(group: Node, name: str) -> tuple[Item, dict[Result, Region]]:
    """Read one item's problem from its attributes, and compare its datasets with that."""
    reject = group.file.reject
    fault = item_name_fault(name)
    node = group.child(name) if not fault else None
    if node is None:
        raise reject(f"item {shown(name)!r}: its name {fault or 'leads nowhere'}", _ANEW)
    index, text = node.attribute("index"), node.attribute("problem")
    try:
        problem = AttentionProblem(**json.loads(str(text)))
    except (RejectedError, TypeError, ValueError) as error:
        raise reject(f"item {name!r}: its problem is {shown(str(text))} ({error})", _ANEW) from None
    if not isinstance(index, int):
        raise reject(f"item {name!r}: index is {index!r}", _ANEW)
    shape = (problem.q_tokens, problem.q_heads, problem.v_head_dim)
    results: dict[Result, Region] = {"output": _region(node, "output", shape, NUMPY[problem.dtype])}
    if node.child("lse") is not None:
        results["lse"] = _region(node, "lse", shape[:2], np.dtype("<f4"))
    return Item(name, index, problem), results


def _ledger_regions(book: Node, items: int) -> dict[str, Region]:
    crc32 = book.child("crc32")
    shape = crc32.storage().shape if crc32 is not None and crc32.is_dataset else ()
    width = shape[1] if len(shape) == 2 else 0
    return {
        "state": _region(book, "state", (items,), np.dtype("<u1")),
        "crc32": _region(book, "crc32", (items, width), np.dtype("<u4")),
        "spans": _region(book, "spans", (items, width, RANK_SPANS, 2), np.dtype("<u8")),
        "ranks": _region(book, "ranks", (items,), np.dtype("<u4")),
        "strategy": _region(book, "strategy", (items,), np.dtype("<u1")),
        "reason": _region(book, "reason", (items,), np.dtype(f"S{REASON_BYTES}")),
    }


def _region(parent: Node, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Region:
    """Find a contiguous dataset of just this shape and dtype, inside this file."""
    reject = parent.file.reject
    node = parent.child(name)
    if node is None or not node.is_dataset or node.file is not parent.file:
        raise reject(f"{parent.path} has no dataset {name!r}", _ANEW)
    storage = node.storage()
    found = storage.stored
    name_of = found if isinstance(found, str) else found.dtype
    same = name_of == dtype.name or (isinstance(found, str) and storage.dtype == dtype)
    if storage.offset is None or storage.shape != shape or not same:
        raise reject(
            f"{node.path} is {name_of} {list(storage.shape)}, {storage}; "
            f"want {dtype.name} {list(shape)}, contiguous",
            _ANEW,
        )
    return Region(storage.offset, shape, dtype)


def _check_apart(root: Node, regions: Sequence[Region]) -> None:
    """No two datasets share bytes: writing one would change the other."""
    end = 0
    for region in sorted(regions, key=lambda region: region.offset):
        if region.offset < end:
            raise root.file.reject("two of its datasets overlap", _ANEW)
        end = region.stop
