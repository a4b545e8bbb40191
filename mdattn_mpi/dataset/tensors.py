"""Reading named tensors of any dtype, ``/items/<name>/<tensor>``: what a model takes.

A tensor lies in one run, and its tokens too: what `Region` says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from mdattn_mpi.dataset.dtypes import Stored, numpy_dtype, stored_as
from mdattn_mpi.dataset.hdf5 import File, Node
from mdattn_mpi.dataset.index import chosen_names, patterns_of
from mdattn_mpi.dataset.layout import (
    ITEMS,
    MAX_ITEMS,
    AnyItem,
    item_name_fault,
    natural_order,
    shown,
)
from mdattn_mpi.dataset.positioned import Region, read_exactly
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import Span, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 4096  # blocks of the content that go into a digest, over all items
SAMPLE_BYTES = 4096
ANY = -1  # in a shape: the file decides


class TensorFile:
    """Some tensors of every selected item of a file, open for reading.

    Parameters
    ----------
    path
        The file.
    tensors
        What every item must have; -1 in place of the number of tokens.
    select
        Names or globs of items, separated by commas.
    allow
        Folders that links in the file may lead to.

    Attributes
    ----------
    path, size
        The file, and its bytes.
    tokens
        Of every selected item, by name, in natural order.

    Raises
    ------
    RejectedError
        An item lacks a tensor, or it isn't as it must be; nothing matches.

    """

    warnings = ()

    def __init__(
        self,
        path: str,
        tensors: Sequence[TensorSpec],
        *,
        select: str = "*",
        allow: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._file = File(path, allow)
        self.size = self._file.size
        self._regions: dict[str, dict[str, Region]] = {}
        self.tokens: dict[str, int] = {}
        try:
            for node in _items(self._file, select):
                name = node.path.rpartition("/")[2]
                try:
                    found = {each.name: _input(node, each) for each in tensors}
                    self.tokens[name] = _tokens(node, found)
                except RejectedError as error:
                    error.item = name
                    raise
                self._regions[name] = found
            self._file.release()
        except BaseException:
            self._file.close()
            raise

    def describe(self, item: AnyItem) -> str:
        """Say an item's shape as it was understood, in one sentence."""
        return str(item.problem)

    def read(self, item: AnyItem, tensor: str, spans: Sequence[Span], *, out: Array) -> Array:
        """Read the tokens of `spans` into `out`, one span after the other; any thread may call.

        A tensor without a token dim is read in whole.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        region = self._regions[item.name][tensor]
        if out.shape != region.part(spans) or out.dtype != region.dtype:
            raise ValueError(
                f"out is {out.dtype}{list(out.shape)}, want {region.dtype}{region.part(spans)}"
            )
        with self._reading(item.name, tensor):
            region.read(self._file.fd, spans, out)
        return out

    @contextmanager
    def _reading(self, item: str, tensor: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ItemError(
                f"{tensor} can't be read: {error}",
                fix="copy the file again",
                file=self.path,
                item=item,
            ) from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shapes, dtypes and samples of the content, whatever the path."""
        digest = hashlib.sha256()
        tensors = [
            (item, name, region)
            for item, regions in self._regions.items()
            for name, region in regions.items()
        ]
        every, blocks = -(-len(tensors) // SAMPLES), max(1, SAMPLES // len(tensors))
        for number, (item, name, region) in enumerate(tensors):
            digest.update(json.dumps([item, name, region.shape, region.dtype.name]).encode())
            if number % every == 0:
                with self._reading(item, name):
                    for block in _samples(self._file.fd, region, blocks):
                        digest.update(block.data)
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, str | int]:
        """What an output remembers of its input."""
        return {
            "input_path": os.path.realpath(self.path),
            "input_size": self.size,
            "input_digest": self.digest,
        }

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _samples(fd: int, region: Region, blocks: int) -> Iterator[Array]:
    """Read blocks all over a tensor: all of it, where it is small."""
    size = min(SAMPLE_BYTES, region.nbytes)
    last = region.nbytes - size
    for start in sorted({last * block // max(1, blocks - 1) for block in range(blocks)}):
        block = np.empty(size, np.uint8)
        read_exactly(fd, region.offset + start, block)
        yield block


def tensor_names(path: str, allow: Sequence[str] = ()) -> list[str]:
    """List the tensors of a file's first item."""
    with File(path, allow) as file:
        first = next(_items(file, "*"))
        return sorted(first.names(MAX_ITEMS)) if first.is_group else []


def _items(file: File, select: str) -> Iterator[Node]:
    """Find the items that are selected, in natural order."""
    group = file.root.child(ITEMS)
    if group is None or not group.is_group:
        raise file.reject(f"has no group /{ITEMS}", "see docs/file-format.md")
    chosen = chosen_names(set(group.names(MAX_ITEMS)), patterns_of(select), file.path)
    for name in sorted(chosen, key=natural_order):
        fault = item_name_fault(name)
        node = group.child(name) if not fault else None
        if node is None:
            words = f"item {shown(name)!r}: its name {fault or 'leads nowhere'}"
            raise file.reject(words, "rename it")
        yield node


def _input(item: Node, tensor: TensorSpec) -> Region:
    region = find_region(item, tensor, "store what the model takes, contiguous: h5repack -l CONTI")
    if 0 in region.shape:
        raise item.file.reject(f"{tensor.name} has shape {list(region.shape)}", "store some tokens")
    return region


def _tokens(item: Node, found: dict[str, Region]) -> int:
    """Count the tokens of an item, on which all its tensors agree."""
    lengths = {
        name: region.shape[region.token_dim]
        for name, region in found.items()
        if region.token_dim is not None
    }
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} has {count}" for name, count in lengths.items()) or "no tensor"
        raise item.file.reject(f"tokens disagree: {told}", "give all the same number")
    return next(iter(lengths.values()))


def find_region(parent: Node, tensor: TensorSpec, fix: str) -> Region:
    """Find a contiguous dataset of just this shape and dtype, inside this file.

    Raises
    ------
    RejectedError
        It isn't there, or not like that.

    """
    reject = parent.file.reject
    node = parent.child(tensor.name)
    if node is None or not node.is_dataset or node.file is not parent.file:
        raise reject(f"{parent.path} has no dataset {tensor.name!r}", fix)
    storage, dtype = node.storage(), numpy_dtype(tensor.dtype)
    with node.file.guard(node.path):
        stored = node.id.get_type()
        found = stored_as(stored, lambda: str(node.attribute("dtype") or ""))
        if isinstance(found, Stored):
            name: str = found.dtype
            same = name == dtype.name and found.little_endian
        else:
            name, same = found, stored.dtype == dtype.newbyteorder("<")
    fits = len(storage.shape) == len(tensor.shape) and all(
        want in (ANY, have) for want, have in zip(tensor.shape, storage.shape, strict=True)
    )
    if storage.offset is None or not fits or not same:
        raise reject(
            f"{node.path} is {name} {list(storage.shape)}, {storage}; "
            f"want {dtype.name} {_extents(tensor)}, contiguous",
            fix,
        )
    return Region(storage.offset, storage.shape, dtype, tensor.token_dim)


def _extents(tensor: TensorSpec) -> str:
    """For example ``[tokens, 1, 128]``."""
    return f"[{', '.join('tokens' if dim == ANY else str(dim) for dim in tensor.shape)}]"
