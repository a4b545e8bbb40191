"""Tensors in other people's files: .npz, .safetensors, any HDF5. Nothing here runs code of theirs.

Every format says what it holds in a header; no header is believed before its claims have been
compared with the size of the file.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY, Stored
from mdattn_mpi.dataset.hdf5 import WHOLE_TREE, File, Node, must_be_regular
from mdattn_mpi.dataset.layout import MAX_COMPRESSION, MAX_NODES, shown
from mdattn_mpi.errors import MdattnError, RejectedError

Array = np.ndarray[Any, np.dtype[Any]]
Slices = tuple[slice, ...]

MAX_HEADER_BYTES = 100 << 20  # of a .safetensors file; the format's own limit
DTYPES = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of 16, 32 or 64-bit floats; `fetch` reads a part of it, unless it has a fault."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fetch: Callable[[Slices], Array]
    fault: RejectedError | None = None


def open_foreign(
    path: str, stack: ExitStack, allow: Sequence[str] = ()
) -> dict[str, ForeignTensor]:
    """List the tensors of a file by name; tensors of other dtypes are left out.

    Parameters
    ----------
    path
        The file. Its content, not its name, decides what it is.
    stack
        Closes what stays open for `ForeignTensor.fetch`.
    allow
        Folders that links in an HDF5 file may lead to.

    Raises
    ------
    RejectedError
        The file is none of these, or damaged.

    """
    must_be_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if start.startswith(b"PK"):
            return _npz_tensors(path, stack)
        if start[8:9] == b"{":
            return _safetensors(path)
        if h5py.is_hdf5(path):
            return _hdf5_tensors(stack.enter_context(File(path, allow, depth=WHOLE_TREE)))
    except MdattnError:
        raise
    except Exception as error:
        raise RejectedError(
            f"can't be read ({error})", fix="check the path; copy the file again", file=path
        ) from None
    raise RejectedError(
        "is neither HDF5 nor .npz nor .safetensors", fix="save it as one of these", file=path
    )


def _safetensors(path: str) -> dict[str, ForeignTensor]:
    """Eight bytes of header length, the header in JSON, the tensors back to back."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header claims {length} bytes")
        header = json.loads(file.read(length))
    content = np.memmap(path, np.uint8, "r", 8 + length) if size > 8 + length else np.zeros(0, "u1")
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__" or about["dtype"] not in DTYPES:
            continue
        dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
        start, stop = about["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"{shown(name)} has shape {shape} at {start}:{stop}")
        if stop > content.size or stop - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"{shown(name)} doesn't fit: {shape} at bytes {start}:{stop}")
        tensors[name] = _of_array(content[start:stop].view(dtype).reshape(shape))
    return tensors


def _npz_tensors(path: str, stack: ExitStack) -> dict[str, ForeignTensor]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    kept: dict[str, Array] = {}  # one array at most: callers go through tensor after tensor

    def fetcher(about: zipfile.ZipInfo, dtype: np.dtype[Any]) -> Callable[[Slices], Array]:
        def fetch(index: Slices) -> Array:
            if about.filename not in kept:
                kept.clear()
                kept[about.filename] = _load(archive, about, dtype)
            return kept[about.filename][index]

        return fetch

    tensors = {}
    for about in archive.infolist()[:MAX_NODES]:
        if about.file_size > MAX_COMPRESSION * max(1, about.compress_size):
            raise ValueError(f"{shown(about.filename)} claims {about.file_size} bytes")
        name = about.filename.removesuffix(".npy")
        with archive.open(about) as member:
            shape, _, dtype = _npy_header(member)
            claimed = member.tell() + prod(shape) * dtype.itemsize
        if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
            dtype = NUMPY["bfloat16"]  # what NumPy makes of an ml_dtypes array
        if dtype.kind == "f" or dtype == NUMPY["bfloat16"]:
            if claimed != about.file_size:
                raise ValueError(f"{shown(name)} claims {claimed} bytes, has {about.file_size}")
            tensors[name] = ForeignTensor(shape, dtype, fetcher(about, dtype))
    return tensors


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"it is .npy of version {version}")
    shape, fortran, dtype = read(member)
    return tuple(int(n) for n in shape), bool(fortran), dtype


def _load(archive: zipfile.ZipFile, about: zipfile.ZipInfo, dtype: np.dtype[Any]) -> Array:
    """Read one array of an .npz file into memory."""
    with archive.open(about) as member:
        shape, fortran, _ = _npy_header(member)
        array = np.empty(shape, dtype, "F" if fortran else "C")
        rest = array.reshape(-1, order="A").view(np.uint8).data
        while len(rest):
            count = member.readinto(rest[: 1 << 24])  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{shown(about.filename)} ends too early")
            rest = rest[count:]
    return array


def _hdf5_tensors(file: File) -> dict[str, ForeignTensor]:
    """Walk all groups; a group that is met twice, and what lies in other files, is left out."""
    tensors: dict[str, ForeignTensor] = {}
    pending = [("", file.root)]
    while pending:
        path, node = pending.pop()
        if node.is_dataset:
            found = _hdf5_tensor(node)
            if found is not None:
                tensors[path] = found
        elif node.is_group:
            for name, child in _children(node):
                pending.append((f"{path}/{name}".lstrip("/"), child))
    return tensors


def _children(node: Node) -> list[tuple[str, Node]]:
    children = []
    for name in node.names():
        try:
            child = node.child(name)
        except RejectedError:
            continue
        if child is not None:
            children.append((name, child))
    return children


def _hdf5_tensor(node: Node) -> ForeignTensor | None:
    try:
        storage = node.storage()
    except RejectedError as fault:
        return ForeignTensor((), np.dtype("f2"), lambda _: np.zeros(0), fault)
    if isinstance(storage.stored, Stored):
        dtype = NUMPY[storage.stored.dtype]
        raw = np.dtype("<u2" if storage.stored.little_endian else ">u2")
    elif storage.dtype is not None and storage.dtype.kind == "f":
        dtype = raw = storage.dtype
    else:
        return None

    def fetch(index: Slices) -> Array:
        runs = [part.indices(extent) for part, extent in zip(index, storage.shape, strict=True)]
        count = tuple(stop - start for start, stop, _ in runs)
        array = np.empty(count, raw)
        try:
            node.read_box(storage, tuple(start for start, *_ in runs), array)
        except (OSError, ValueError) as error:
            raise node.file.reject(
                f"{shown(node.path)} can't be read ({error})", "copy the file again"
            ) from error
        return array.astype("=u2").view(dtype) if raw.kind == "u" else array

    return ForeignTensor(storage.shape, dtype, fetch)


def _of_array(array: Array) -> ForeignTensor:
    return ForeignTensor(array.shape, array.dtype, lambda index: array[index])
