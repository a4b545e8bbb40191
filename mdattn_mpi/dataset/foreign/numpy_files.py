"""Arrays as NumPy saves them, one in a .npy file, several in a .npz archive; no pickles."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.foreign.tensor import (
    Array,
    ForeignFile,
    ForeignTensor,
    Slices,
    is_list,
    is_tensor,
    of_array,
    stem_of,
)
from mdattn_mpi.dataset.hdf5 import Value
from mdattn_mpi.dataset.layout import MAX_COMPRESSION, MAX_NODES, shown
from mdattn_mpi.errors import RejectedError

MAX_VALUE_BYTES = 1 << 16  # of a number or text, with its header


class Header(NamedTuple):
    """What a .npy header claims."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    size: int  # bytes of the whole file


def read_npy(path: str) -> ForeignFile:
    """One array, under the name of its file.

    Raises
    ------
    RejectedError
        Its elements are neither floats nor 16-bit integers.
    ValueError
        It is damaged.

    """
    with open(path, "rb") as file:
        header = _header(file)
        start = file.tell()
    if not (is_tensor((1,), header.dtype) or is_list(header.shape, header.dtype)):
        raise RejectedError(
            f"holds {header.dtype}, not floats", fix="save it as float16 or float32", file=path
        )
    if header.size != os.path.getsize(path):
        raise ValueError(f"it claims {header.size} bytes, has {os.path.getsize(path)}")
    order: Literal["F", "C"] = "F" if header.fortran else "C"
    array: Array = np.zeros(header.shape, header.dtype)
    if prod(header.shape):
        array = np.memmap(path, header.dtype, "r", start, header.shape, order)
    found = ForeignFile()
    found.put(stem_of(path), of_array(array))
    return found


def read_npz(path: str, stack: ExitStack) -> ForeignFile:
    """Arrays by name; numbers and text are among the others.

    Raises
    ------
    ValueError
        It is damaged, or claims more than it can hold.

    """
    archive = stack.enter_context(zipfile.ZipFile(path))
    kept: dict[str, Array] = {}  # one array at most: callers go through tensor after tensor

    def fetcher(about: zipfile.ZipInfo, dtype: np.dtype[Any]) -> Callable[[Slices], Array]:
        def fetch(index: Slices) -> Array:
            if about.filename not in kept:
                kept.clear()
                kept[about.filename] = _load(archive, about, dtype)
            return kept[about.filename][index]

        return fetch

    found = ForeignFile()
    for about in archive.infolist()[:MAX_NODES]:
        if about.file_size > MAX_COMPRESSION * max(1, about.compress_size):
            raise ValueError(f"{shown(about.filename)} claims {about.file_size} bytes")
        name = about.filename.removesuffix(".npy")
        with archive.open(about) as member:
            header = _header(member)
        if not (is_tensor(header.shape, header.dtype) or is_list(header.shape, header.dtype)):
            found.others[name] = _value(archive, about, header)
            continue
        if header.size != about.file_size:
            raise ValueError(f"{shown(name)} claims {header.size} bytes, has {about.file_size}")
        fetch = fetcher(about, header.dtype)
        found.put(name, ForeignTensor(header.shape, header.dtype, fetch))
    return found


def _header(member: Any) -> Header:
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"it is .npy of version {version}")
    shape, fortran, dtype = read(member)
    size = member.tell() + prod(shape) * dtype.itemsize
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        dtype = NUMPY["bfloat16"]  # what NumPy makes of an ml_dtypes array
    return Header(tuple(int(n) for n in shape), bool(fortran), dtype, size)


def _value(archive: zipfile.ZipFile, about: zipfile.ZipInfo, header: Header) -> Value | None:
    """One number or text; None of anything else."""
    simple = not header.shape and header.dtype.kind in "biufSU" and header.size < MAX_VALUE_BYTES
    if not simple or header.size != about.file_size:
        return None
    value: Any = _load(archive, about, header.dtype)[()].item()
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _load(archive: zipfile.ZipFile, about: zipfile.ZipInfo, dtype: np.dtype[Any]) -> Array:
    """Read one array of an archive into memory."""
    with archive.open(about) as member:
        header = _header(member)
        array = np.empty(header.shape, dtype, "F" if header.fortran else "C")
        rest = array.reshape(-1, order="A").view(np.uint8).data
        while len(rest):
            count = member.readinto(rest[: 1 << 24])  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{shown(about.filename)} ends too early")
            rest = rest[count:]
    return array
