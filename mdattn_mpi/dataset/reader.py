"""Opening inputs: a dataset for attention, or the file of named tensors that a model takes.

A child process, of this rank or of another, has looked at every selected item once: names, links,
shapes, dtypes, storage.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mdattn_mpi.dataset.hdf5 import File
from mdattn_mpi.dataset.index import IndexedItem, find_items, first_of
from mdattn_mpi.dataset.layout import LAYOUTS, AnyItem, Item, Tensor, natural_order
from mdattn_mpi.dataset.tensors import TensorData, TensorFile
from mdattn_mpi.errors import RejectedError

MANY_HEADS = 128  # more than that, and more than tokens, may be tokens


class Dataset(TensorFile):
    """An open dataset: query, key and value of every item.

    Attributes
    ----------
    items
        The selected items that can be done, in natural order of their names.
    faults
        The selected items that can't be; empty unless `open_dataset` was told to keep them.

    """

    items: tuple[Item, ...]

    def __init__(self, file: File, items: Sequence[IndexedItem], faults: Sequence[RejectedError]):
        ordered = sorted(items, key=lambda item: natural_order(item.name))
        super().__init__(
            file,
            [Item(item.name, index, item.problem) for index, item in enumerate(ordered)],
            {item.name: item.tensors for item in ordered},
        )
        self.faults = tuple(faults)
        self.warnings = tuple(self._warnings())

    def __enter__(self) -> Dataset:
        return self

    def describe(self, item: AnyItem) -> str:
        """Say an item's shape as it was understood, in one sentence."""
        return f"{item.problem}, {self.tensor(item, 'key').layout.replace('_', '-')}"

    def _warnings(self) -> list[str]:
        tensors = [data for found in self._tensors.values() for data in found.values()]
        swapped = sum(data.layout == "head_major" for data in tensors)
        indirect = [data for data in tensors if data.node.offset is None]
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
    with _no_garbage():
        file = File(path, allow, select=select, catalog=catalog)
        try:
            found, faults = find_items(file, layout, ignore)
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
        if tensor.layout == "token_major" and tensor.shape[1] > max(MANY_HEADS, tensor.shape[0])
    ]
    if not found:
        return []
    return [
        f"item {found[0].name!r} has more heads than tokens: {found[0].problem}. If it is stored "
        "by heads, add --layout head_major; `mdattn convert` with --layout settles it"
    ]
