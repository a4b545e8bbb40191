"""An output that is being written or read: shards, checksums, ledger.

Opening it asks a scan for the offsets; from then on the file is bytes at known places, written by
`os.pwrite` from all ranks at once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from mdattn_mpi.dataset.contents import Contents, contents_of
from mdattn_mpi.dataset.hdf5 import File, Value
from mdattn_mpi.dataset.index import check_format
from mdattn_mpi.dataset.layout import (
    OUTPUT_FORMAT,
    AnyItem,
)
from mdattn_mpi.dataset.ledger import Ledger
from mdattn_mpi.dataset.positioned import Region, checksum, write_exactly, writing
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import Span

P = TypeVar("P")

Array = np.ndarray[Any, np.dtype[Any]]

# Options that a resumed job may change when its user says so.
CHANGEABLE = ("strategy", "backend", "ranks", "group_size", "kernel", "transfer", "engine")
# Earlier versions didn't record these; most of their outputs were begun with the defaults.
UNRECORDED: Mapping[str, Value] = {"ignore": "", "kernel": "auto", "transfer": "auto", "engine": ""}
_ANEW = "start over: --overwrite"
BLOCK_BYTES = 8 << 20  # checksum and write go over the same block while it is in the cache


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
        Whether it has room for the log-sum-exp of attention.

    """

    def __init__(self, path: str, fd: int, attributes: Mapping[str, Value], contents: Contents):
        self.path = path
        self.attributes = dict(attributes)
        self.items = contents.items
        self.ledger = Ledger(path, fd, contents.items, contents.ledger)
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

    def allow_writing(self) -> None:
        """Open the very same file for writing too.

        Raises
        ------
        RejectedError
            It can't be; the output is closed then.

        """
        looked_at, self._fd = self._fd, -1
        try:
            self._fd = self.ledger.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            same = os.path.sameopenfile(self._fd, looked_at)
        except OSError as error:
            raise RejectedError(
                f"can't be opened for writing: {error.strerror}",
                fix="check who may write it",
                file=self.path,
            ) from error
        finally:
            os.close(looked_at)
        if not same:
            self.close()
            raise RejectedError(
                "was replaced while it was opened", fix="run the same command again", file=self.path
            )

    def item(self, name: str) -> AnyItem:
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

    def left(self, items: Sequence[AnyItem]) -> list[int]:
        """Return the positions of those of a job's `items` that aren't done."""
        rows = zip(self.items, self.ledger.done(), strict=True)
        done = {item.name for item, is_done in rows if is_done}
        return [number for number, item in enumerate(items) if item.name not in done]

    def match(self, attributes: Mapping[str, Value]) -> dict[str, tuple[Value | None, Value]]:
        """List what differs from `attributes`: by name, what the output says and what was given.

        An option that the output doesn't record is taken to have its default.
        """
        return {
            name: (self.attributes.get(name), value)
            for name, value in attributes.items()
            if self.attributes.get(name, UNRECORDED.get(name)) != value
        }

    def regions(self, item: AnyItem) -> Mapping[str, Region]:
        """Say where each tensor of an item lies, by its name."""
        return self._regions[self.item(item.name).index]

    def check_resume(
        self, items: Sequence[AnyItem], given: Mapping[str, Value], *, allow_change: bool
    ) -> None:
        """Make sure that going on with `items` and what is `given` gives what this output began.

        Raises
        ------
        RejectedError
            The input or the options changed; says which. `allow_change` admits the options in
            `CHANGEABLE`: they don't alter the meaning of the result, only its last bits.

        """
        now = {item.name: item.problem for item in items}
        if now != {item.name: item.problem for item in self.items}:
            raise self._changed(["its items, or what is to be computed of them, are others"])
        # The file may have moved, and items were compared above.
        compared = {n: value for n, value in given.items() if n not in ("input_path", "items")}
        changes = self.match(compared)
        if any(name not in CHANGEABLE for name in changes) or (changes and not allow_change):
            raise self._changed(
                [
                    f"{name} was {'not recorded' if old is None else _brief(old)}, is {_brief(new)}"
                    for name, (old, new) in changes.items()
                ],
                changeable=all(name in CHANGEABLE for name in changes),
            )

    def _changed(self, changes: Sequence[str], changeable: bool = False) -> RejectedError:
        allow = ", or go on all the same with --allow-change" if changeable else ""
        return RejectedError(
            f"belongs to another job: {'; '.join(changes)}",
            fix=f"run it as before, name another output, start over with --overwrite{allow}",
            file=self.path,
        )

    def write(self, item: AnyItem, spans: Sequence[Span], arrays: Mapping[str, Array]) -> int:
        """Write one rank's shard; `sync` makes it last.

        `arrays` are by the tensor's name: the tokens of `spans`, one span after the other; all of a
        tensor without token dim, which only the first rank writes. Returns a CRC-32 over the bytes,
        tensor by tensor.

        Raises
        ------
        OutputError
            The disk is full, or failed.

        """
        checksum = 0
        for name, region, array in self._places(item, spans, arrays):
            data, done = array.reshape(-1).view(np.uint8), 0
            for offset, nbytes in region.runs(spans):
                part = data[done : done + nbytes]
                checksum = self._write_run(item, name, offset, part, checksum)
                done += nbytes
        return checksum

    def _places(
        self, item: AnyItem, spans: Sequence[Span], arrays: Mapping[str, Array]
    ) -> list[tuple[str, Region, Array]]:
        """Pair what was given with its place in the file; contiguous, and of its shape."""
        regions = self.regions(item)
        missing = {n for n, r in regions.items() if r.token_dim is not None} - arrays.keys()
        if missing or arrays.keys() - regions.keys():
            raise ValueError(f"item {item.name!r}: want {list(regions)}, got {list(arrays)}")
        found = [(name, region, arrays[name]) for name, region in regions.items() if name in arrays]
        for name, region, array in found:
            shape = region.part(spans)
            if array.shape != shape or array.dtype != region.dtype:
                raise ValueError(
                    f"item {item.name!r}: {name} is {array.dtype}{list(array.shape)}, "
                    f"want {region.dtype}{list(shape)}"
                )
        return [(name, region, np.ascontiguousarray(array)) for name, region, array in found]

    def _write_run(
        self, item: AnyItem, tensor: str, offset: int, data: Array, checksum: int
    ) -> int:
        with writing(tensor, self.path, item.name):
            for start in range(0, data.size, BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES].data
                checksum = zlib.crc32(block, checksum)
                write_exactly(self._fd, offset + start, block)
        return checksum

    def read(self, item: AnyItem, tensor: str, spans: Sequence[Span] | None = None) -> Array:
        """Read the tokens of `spans` (all of them when left out), one span after the other.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        region = self.regions(item)[tensor]
        if spans is None:
            spans = () if region.token_dim is None else (Span(0, region.shape[region.token_dim]),)
        array = np.empty(region.part(spans), region.dtype)
        with self._reading(item, tensor):
            region.read(self._fd, spans, array)
        return array

    def checksum(self, item: AnyItem, spans: Sequence[Span], *, first: bool = True) -> int:
        """Compute from the file what `write` returned for the same spans.

        `first` says whether it was the first rank, which writes what has no token dim.
        """
        crc32 = 0
        for name, region in self.regions(item).items():
            if region.token_dim is None and not first:
                continue
            with self._reading(item, name):
                for offset, nbytes in region.runs(spans):
                    crc32 = checksum(self._fd, offset, nbytes, crc32)
        return crc32

    def damaged(self, item: AnyItem) -> tuple[int, ...]:
        """Name the ranks whose shard of a finished item has other bytes than they wrote.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        entry = self.ledger.entry(item)
        return tuple(
            rank
            for rank, (spans, crc32) in enumerate(zip(entry.shards, entry.crc32s, strict=True))
            if self.checksum(item, spans, first=rank == 0) != crc32
        )

    @contextmanager
    def _reading(self, item: AnyItem, tensor: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ItemError(
                f"{tensor} can't be read: {error.strerror or error}",
                fix="restore the file, or start over with --overwrite",
                file=self.path,
                item=item.name,
            ) from error

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises
        ------
        OutputError
            The disk failed: what was written since the last sync may be lost.

        """
        with writing("what was computed", self.path):
            os.fdatasync(self._fd)


def open_output(
    path: str | os.PathLike[str], writable: bool = False, *, catalog: bytes | None = None
) -> Output:
    """Open an output and check its structure, for writing shards too if it is to be `writable`.

    `catalog` is what `scan_file` returned for the same file on another rank; left out, it is looked
    at here.

    Raises
    ------
    RejectedError
        It isn't one, it is damaged, or it can't be opened for writing.

    """
    with File(path, catalog=catalog) as file:
        check_format(file.root, OUTPUT_FORMAT)
        contents = contents_of(file.root)
        output = Output(file.path, os.dup(file.fd), file.root.attributes(), contents)
    if writable:
        output.allow_writing()
    return output


def _brief(value: Value | None) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}…"
