"""Files of a model's inputs and outputs: any tensors of 16-bit numbers that have a token dim.

Input: the datasets that were bound, ``/items/<name>/<dataset>``. Output::

    /                         format = "mdattn-model-output", version = 1, and provenance
    /items/<name>/<dataset>   contiguous; attribute of the item: index
    /ledger/state             [items]  uint8: 0 todo, 1 done

All dims before the one that counts tokens are 1, so that a rank's shard is one run of bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.dataset.dtypes import NUMPY, hdf5_type
from mdattn_mpi.dataset.hdf5 import File, Node, Value
from mdattn_mpi.dataset.index import patterns_of
from mdattn_mpi.dataset.layout import (
    ITEMS,
    LEDGER,
    VERSION,
    item_name_fault,
    natural_order,
    shown,
)
from mdattn_mpi.dataset.positioned import read_exactly, write_exactly
from mdattn_mpi.dataset.writer import allocate, new_file, put_attributes
from mdattn_mpi.errors import ItemError, OutputError, RejectedError
from mdattn_mpi.problem import DTypeName, Span

MODEL_FORMAT = "mdattn-model-output"
DONE = 1

Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """A tensor in a file whose tokens lie one after the other."""

    shape: tuple[int, ...]
    axis: int
    dtype: np.dtype[Any]
    offset: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return prod(self.shape[self.axis + 1 :]) * self.dtype.itemsize

    def part(self, span: Span) -> tuple[int, tuple[int, ...]]:
        """Return where `span` begins in the file, and its shape."""
        shape = (*self.shape[: self.axis], len(span), *self.shape[self.axis + 1 :])
        return self.offset + span.start * self.token_bytes, shape


@dataclass(frozen=True)
class TensorItem:
    """One sequence: its name, its tokens, its tensors by the name of their dataset."""

    name: str
    tokens: int
    runs: Mapping[str, Run]


class TensorFile:
    """The bound datasets of a file, open for reading; `read` is safe in any thread.

    Parameters
    ----------
    path
        The file.
    axes
        The datasets, and which dim counts tokens in each.
    select
        Names or globs of items, separated by commas.
    allow
        Folders that links in the file may lead to.

    Raises
    ------
    RejectedError
        An item lacks a dataset, or it isn't as it must be; nothing matches.

    """

    def __init__(
        self, path: str, axes: Mapping[str, int], *, select: str = "*", allow: Sequence[str] = ()
    ) -> None:
        self.path = path
        self._file = File(path, allow)
        try:
            group = self._file.root.child(ITEMS)
            if group is None or not group.is_group:
                raise self._file.reject(f"has no group /{ITEMS}", "see docs/onnx.md")
            patterns = patterns_of(select)
            names = sorted(group.names(), key=natural_order)
            chosen = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
            if not chosen:
                raise self._file.reject(f"no item matches {select!r}", "see `mdattn inspect`")
            self.items = tuple(_item(group, name, axes) for name in chosen)
        except BaseException:
            self._file.close()
            raise

    def read(self, item: TensorItem, dataset: str, span: Span) -> Array:
        """Read the tokens of `span`.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        run = item.runs[dataset]
        offset, shape = run.part(span)
        array = np.empty(shape, run.dtype)
        try:
            read_exactly(self._file.fd, offset, array)
        except OSError as error:
            raise ItemError(
                f"{dataset} can't be read: {error}",
                fix="copy the file again",
                file=self.path,
                item=item.name,
            ) from error
        return array

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _item(group: Node, name: str, axes: Mapping[str, int]) -> TensorItem:
    fault = item_name_fault(name)
    node = group.child(name) if not fault else None
    if node is None:
        words = f"item {shown(name)!r}: its name {fault or 'leads nowhere'}"
        raise group.file.reject(words, "rename it")
    try:
        runs = {dataset: _run(node, dataset, axis) for dataset, axis in axes.items()}
        lengths = {dataset: run.shape[run.axis] for dataset, run in runs.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{dataset} has {count}" for dataset, count in lengths.items())
            raise group.file.reject(f"tokens disagree: {told}", "give all the same number")
    except RejectedError as error:
        error.item = name
        raise
    return TensorItem(name, next(iter(lengths.values())), runs)


def _run(item: Node, dataset: str, axis: int) -> Run:
    """Look at one dataset; it must be 16-bit floats in one run, tokens first."""
    reject = item.file.reject
    node = item.child(dataset)
    if node is None or not node.is_dataset:
        raise reject(f"has no dataset {dataset!r}", "write it, or bind another")
    storage = node.storage()
    if axis >= len(storage.shape) or prod(storage.shape[:axis]) != 1 or not prod(storage.shape):
        raise reject(
            f"{dataset} has shape {list(storage.shape)}; tokens are bound to dim {axis}",
            "store tokens before all other dims",
        )
    stored = storage.stored
    if isinstance(stored, str) or not stored.little_endian:
        raise reject(f"{dataset} holds {stored}", "store little-endian BF16 or FP16")
    if storage.offset is None or node.file is not item.file:
        raise reject(f"{dataset} is {storage}", "store it contiguous: h5repack -l CONTI")
    return Run(storage.shape, axis, NUMPY[stored.dtype], storage.offset)


@dataclass(frozen=True)
class Wanted:
    """An output to make room for: shape of the whole sequence, token dim, dtype."""

    shape: tuple[int, ...]
    axis: int
    dtype: DTypeName


def create_model_output(
    path: str,
    items: Mapping[str, Mapping[str, Wanted]],
    attributes: Mapping[str, Value],
    *,
    overwrite: bool = False,
) -> None:
    """Make an output with room for all `items`, by name and dataset; on one rank only.

    Raises
    ------
    RejectedError
        It exists (without `overwrite`), its folder doesn't, or the filesystem has no room.

    """
    nbytes = sum(2 * prod(w.shape) for wanted in items.values() for w in wanted.values())
    with new_file(path, nbytes + 4096 * (len(items) + 1), overwrite=overwrite) as file:
        put_attributes(file.id, {**attributes, "format": MODEL_FORMAT, "version": VERSION})
        group = file.create_group(ITEMS)
        for index, (name, wanted) in enumerate(items.items()):
            folder = group.create_group(name)
            put_attributes(folder.id, {"index": index})
            for dataset, each in wanted.items():
                allocate(folder, dataset, each.shape, hdf5_type(each.dtype))
        states = (len(items),)
        offset = allocate(file.create_group(LEDGER), "state", states, h5py.h5t.STD_U8LE)
        write_exactly(file.id.get_vfd_handle(), offset, bytes(len(items)))


class ModelOutput:
    """An open output of a model's job. Several ranks write to the same file, shards of their own.

    Parameters
    ----------
    path
        The file.
    items
        Names of the items, in the order of `create_model_output`.
    axes
        The datasets of an item, and which dim counts tokens in each.
    attributes
        What the root must say; another job's output is refused.

    Raises
    ------
    RejectedError
        It is another file, of another job, or damaged.

    """

    def __init__(
        self,
        path: str,
        items: Sequence[str],
        axes: Mapping[str, int],
        attributes: Mapping[str, Value],
    ) -> None:
        self.path = path
        with File(path) as file:
            root = file.root
            _check_attributes(root, {**attributes, "format": MODEL_FORMAT, "version": VERSION})
            group, book = root.child(ITEMS), root.child(LEDGER)
            states = book.child("state") if book else None
            if group is None or states is None or states.storage().shape != (len(items),):
                raise file.reject("its items are others", "start anew with --overwrite")
            self._runs = {name: _item(group, name, axes).runs for name in items}
            self._states = states.storage().offset
            self._rows = {name: row for row, name in enumerate(items)}
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def todo(self) -> tuple[str, ...]:
        """Name the items that aren't done."""
        states = np.empty(len(self._rows), np.uint8)
        read_exactly(self._fd, self._state(0), states)
        return tuple(name for name, row in self._rows.items() if states[row] != DONE)

    def _state(self, row: int) -> int:
        assert self._states is not None
        return self._states + row

    def write(self, item: str, dataset: str, span: Span, array: Array) -> None:
        """Write one rank's shard; `sync` makes it last.

        Raises
        ------
        OutputError
            The disk is full, or failed.

        """
        offset, shape = self._runs[item][dataset].part(span)
        if array.shape != shape:
            raise ValueError(f"{item}: {dataset} is {array.shape}, want {shape}")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._do(item, lambda: write_exactly(self._fd, offset, data))

    def sync(self, item: str) -> None:
        """Wait until what was written is on the disk.

        Raises
        ------
        OutputError
            The disk failed.

        """
        self._do(item, lambda: os.fdatasync(self._fd))

    def commit(self, item: str) -> None:
        """Declare `item` done; every rank has synced its shard before."""
        place = self._state(self._rows[item])
        self._do(item, lambda: write_exactly(self._fd, place, bytes([DONE])))
        self.sync(item)

    def _do(self, item: str, action: Any) -> None:
        try:
            action()
        except OSError as error:
            raise OutputError(
                f"can't be written: {error.strerror or error}",
                fix="free some space or mend the filesystem, then run the same command again",
                file=self.path,
                item=item,
            ) from error

    def close(self) -> None:
        """Close the file, without a sync."""
        os.close(self._fd)


def _check_attributes(root: Node, wanted: Mapping[str, Value]) -> None:
    for name, value in wanted.items():
        found = root.attribute(name)
        if found != value:
            raise root.file.reject(
                f"belongs to another job: {name} was {found!r}, is {value!r}",
                "run it as before, name another output, or start anew with --overwrite",
            )


def dataset_names(path: str, allow: Iterable[str] = ()) -> list[str]:
    """List the datasets of the first item of a file."""
    with File(path, tuple(allow)) as file:
        group = file.root.child(ITEMS)
        names = sorted(group.names(), key=natural_order) if group else []
        item = group.child(names[0]) if group and names else None
        return sorted(item.names()) if item and item.is_group else []
