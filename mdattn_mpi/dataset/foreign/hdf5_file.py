"""Any HDF5 file: every dataset of a known type, by its path; and the groups, for what they say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.foreign.tensor import Array, ForeignFile, ForeignTensor, Slices
from mdattn_mpi.dataset.hdf5 import WHOLE_TREE, File, Node
from mdattn_mpi.dataset.index import check_format
from mdattn_mpi.dataset.layout import DATASET_FORMAT, shown
from mdattn_mpi.errors import RejectedError


def read(path: str, stack: ExitStack, allow: Sequence[str]) -> ForeignFile:
    """List what a scan of the whole tree finds; what can't be read has a fault."""
    file = stack.enter_context(File(path, allow, depth=WHOLE_TREE))
    found = ForeignFile()
    if file.root.attribute("format") == DATASET_FORMAT:
        check_format(file.root, DATASET_FORMAT)
    pending = [("", file.root)]
    while pending:
        name, node = pending.pop()
        if node.is_dataset:
            tensor = _hdf5_tensor(node)
            if tensor is None:
                found.others[name] = None
            else:
                found.put(name, tensor)
        elif node.is_group:
            found.groups[name] = node
            for below in node.names():
                place = f"{name}/{below}".lstrip("/")
                try:
                    child = node.child(below)
                except RejectedError as fault:
                    found.tensors[place] = _faulty(fault)
                    continue
                if child is not None:
                    pending.append((place, child))
    return found


def _faulty(fault: RejectedError) -> ForeignTensor:
    return ForeignTensor((0,), np.dtype("f2"), lambda _: np.zeros(0), fault)


def _hdf5_tensor(node: Node) -> ForeignTensor | None:
    try:
        storage = node.storage()
    except RejectedError as fault:
        return _faulty(fault)
    if not isinstance(storage.stored, str):
        dtype = NUMPY[storage.stored.dtype]
        raw = np.dtype("<u2" if storage.stored.little_endian else ">u2")
    elif storage.dtype is not None:
        raw = dtype = storage.dtype
    else:
        return None

    def fetch(index: Slices) -> Array:
        runs = [part.indices(extent) for part, extent in zip(index, storage.shape, strict=True)]
        array = np.empty(tuple(stop - start for start, stop, _ in runs), raw)
        try:
            node.read_box(storage, tuple(start for start, *_ in runs), array)
        except (OSError, ValueError) as error:
            what = f"{shown(node.path)} can't be read ({error})"
            raise node.file.reject(what, "copy the file again") from error
        return array if raw == dtype else array.astype("=u2").view(dtype)

    return ForeignTensor(storage.shape, dtype, fetch)
