"""Any HDF5 file: every dataset of a known type, by its path; and the groups, for what they say."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY, stored_as
from mdattn_mpi.dataset.foreign.tensor import Array, ForeignFile, ForeignTensor, Slices
from mdattn_mpi.dataset.hdf5 import File, Node
from mdattn_mpi.dataset.index import check_format
from mdattn_mpi.dataset.layout import DATASET_FORMAT, MAX_LINK_DEPTH, MAX_NODES
from mdattn_mpi.errors import RejectedError


def read(file: File) -> ForeignFile:
    """Walk all groups; a group that is met twice is left out. What can't be read has a fault."""
    found = ForeignFile({})
    if file.root.attribute("format") == DATASET_FORMAT:
        check_format(file.root, DATASET_FORMAT)
    seen = set()
    pending = [("", file.root, 0)]
    while pending:
        path, node, depth = pending.pop()
        if node.is_dataset:
            tensor = _hdf5_tensor(node)
            if tensor is None:
                found.others[path] = None
            else:
                found.tensors[path] = tensor
        elif node.is_group and node.address not in seen and depth < MAX_LINK_DEPTH:
            seen.add(node.address)
            found.groups[path] = node
            names = node.names(MAX_NODES)
            if len(names) + len(pending) + len(found.tensors) + len(found.others) > MAX_NODES:
                raise file.reject(f"holds more than {MAX_NODES} objects", "split the file")
            for name in names:
                place = f"{path}/{name}".lstrip("/")
                try:
                    child = node.child(name)
                except RejectedError as fault:
                    found.tensors[place] = _faulty(fault)
                    continue
                if child is not None:
                    pending.append((place, child, depth + 1))
    return found


def _faulty(fault: RejectedError) -> ForeignTensor:
    return ForeignTensor((), np.dtype("f2"), lambda _: np.zeros(0), fault)


def _hdf5_tensor(node: Node) -> ForeignTensor | None:
    try:
        storage = node.storage()
        with node.file.guard(node.path):
            stored = stored_as(node.id.get_type(), lambda: str(node.attribute("dtype") or ""))
            if isinstance(stored, str):
                raw = dtype = _numpy_dtype(node.id.get_type())
            else:
                dtype = NUMPY[stored.dtype]
                raw = np.dtype("<u2" if stored.little_endian else ">u2")
    except RejectedError as fault:
        return _faulty(fault)
    if dtype is None or raw is None:
        return None

    def fetch(index: Slices) -> Array:
        runs = [part.indices(extent) for part, extent in zip(index, storage.shape, strict=True)]
        array = np.empty(tuple(stop - start for start, stop, _ in runs), raw)
        with node.file.guard(node.path):
            node.read_box(storage, tuple(start for start, *_ in runs), array)
        return array if raw == dtype else array.astype("=u2").view(dtype)

    return ForeignTensor(storage.shape, dtype, fetch)


def _numpy_dtype(stored: Any) -> np.dtype[Any] | None:
    """Recognise IEEE floats of 32 and 64 bits and integers of 16, of either byte order."""
    known = [np.dtype(order + name) for order in "<>" for name in ("f4", "f8", "u2", "i2")]
    return next((dtype for dtype in known if stored.equal(h5py.h5t.py_create(dtype))), None)
