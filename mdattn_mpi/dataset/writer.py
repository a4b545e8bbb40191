"""Making files: under a temporary name, whole, synced, then renamed.

All datasets are contiguous and allocated when they are made, so that their offsets are known and
HDF5 has nothing left to do: the contents are written by `os.pwrite`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import h5py
import numpy as np

from mdattn_mpi.dataset.contents import describe
from mdattn_mpi.dataset.dtypes import NUMPY, numpy_dtype
from mdattn_mpi.dataset.hdf5 import Value
from mdattn_mpi.dataset.hdf5_types import hdf5_type
from mdattn_mpi.dataset.layout import (
    ITEMS,
    LEDGER,
    MIN_LEDGER_WIDTH,
    OUTPUT_FORMAT,
    VERSION,
    AnyItem,
    Item,
)
from mdattn_mpi.dataset.ledger import ledger_columns
from mdattn_mpi.dataset.positioned import write_exactly
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import MAX_RUNS
from mdattn_mpi.problem import AnyProblem, AttentionProblem, TensorSpec

_libc = ctypes.CDLL(None, use_errno=True)


def create_output(
    path: str | os.PathLike[str],
    items: Sequence[AnyItem],
    *,
    ranks: int,
    lse: bool = False,
    attributes: Mapping[str, Value] | None = None,
    overwrite: bool = False,
) -> None:
    """Make an output with room for the results of all `items`; on one rank only.

    The file is there in whole or not at all. `attributes` are noted at its root.

    Raises
    ------
    RejectedError
        It exists (without `overwrite`), its folder doesn't, or the filesystem has no room.

    """
    with new_file(path, file_bytes(items, lse), overwrite=overwrite) as file:
        put_attributes(
            file.id,
            {
                **(attributes or {}),
                "format": OUTPUT_FORMAT,
                "version": VERSION,
                "ranks": ranks,
            },
        )
        group = add_group(file, ITEMS)
        about = cache(lambda problem: _about(problem, lse))  # many items pose one problem
        for index, item in enumerate(items):
            described, tensors = about(item.problem)
            folder = h5py.h5g.create(group.id, item.name.encode(), gcpl=_of_group())
            _put_attribute(folder, _attribute("index", index))
            for attribute in described:
                _put_attribute(folder, attribute)
            for tensor in tensors:
                _allocate(folder, tensor.name, tensor.shape, _stored(tensor.dtype))
        columns = ledger_columns(len(items), max(ranks, MIN_LEDGER_WIDTH), _runs(items))
        _create_ledger(add_group(file, LEDGER), columns)


def outputs_of(problem: AnyProblem, lse: bool) -> tuple[TensorSpec, ...]:
    """Name the tensors that come out, in their order."""
    return problem.outputs(lse) if isinstance(problem, AttentionProblem) else problem.outputs


def file_bytes(items: Sequence[AnyItem], lse: bool) -> int:
    """Bytes that an output takes, about."""
    posed = Counter(item.problem for item in items)  # many items pose one problem
    results = sum(output_bytes(problem, lse) * count for problem, count in posed.items())
    return results + 4096 * (len(items) + 1)


def output_bytes(problem: AnyProblem, lse: bool) -> int:
    """Bytes of one item's results."""
    return sum(tensor.nbytes for tensor in outputs_of(problem, lse))


def _about(problem: AnyProblem, lse: bool) -> tuple[list[_Attribute], tuple[TensorSpec, ...]]:
    """The attributes of an item that tell its problem, and its tensors."""
    described = [_attribute(name, value) for name, value in describe(problem).items()]
    return described, outputs_of(problem, lse)


@cache
def _stored(name: str) -> Any:
    """Make the HDF5 type that stores the dtype `name`."""
    if name in NUMPY:
        return hdf5_type(name)  # type: ignore[arg-type]
    return h5py.h5t.py_create(numpy_dtype(name).newbyteorder("<"))


def _runs(items: Sequence[AnyItem]) -> int:
    """How many runs of query tokens a rank may own."""
    posed = {item.problem for item in items if isinstance(item, Item)}  # each makes its mask
    return MAX_RUNS if any(problem.mask.hides_keys for problem in posed) else 2


def _create_ledger(group: Any, columns: Sequence[TensorSpec]) -> None:
    """Make the ledger, all zeros: every item is to be done."""
    fd = group.file.id.get_vfd_handle()
    for column in columns:
        stored = _stored(column.dtype)
        offset = allocate(group, column.name, column.shape, stored)
        stop = offset + prod(column.shape) * stored.get_size()
        written = os.fstat(fd).st_size  # beyond it all is zero already: 2.6 KB an item
        write_exactly(fd, offset, bytes(max(0, min(stop, written) - offset)))


@contextmanager
def new_file(
    path: str | os.PathLike[str], nbytes: int, *, overwrite: bool = False
) -> Iterator[h5py.File]:
    """Make a file of about `nbytes`: in place when the block ends well, gone when it doesn't.

    Raises
    ------
    RejectedError
        It exists (without `overwrite`), its folder doesn't, or the filesystem has no room.

    """
    check_place(path, nbytes, overwrite=overwrite)
    shown, final = os.fspath(path), os.path.realpath(path)
    folder, name = os.path.split(final)
    temporary = os.path.join(folder, f".{name}.creating")
    try:
        with _create(temporary) as file:
            yield file
        with open(temporary, "rb+") as made:
            _reserve(made.fileno(), os.fstat(made.fileno()).st_size)
            os.fsync(made.fileno())
        os.rename(temporary, final)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # h5py raises either when the disk is full
        number, words = _reason(error)
        raise RejectedError(f"can't be made: {words}", fix=_fix_of(number), file=shown) from error
    finally:
        with suppress(OSError):  # it isn't there, or nothing can be written: that was said
            os.unlink(temporary)


def _create(path: str) -> h5py.File:
    """Open a new file: any HDF5 since 2008 reads it, and the same contents give the same bytes."""
    created = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    created.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_file_locking(False, True)
    # This version puts a checksum on every piece of metadata; earlier ones don't.
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    return h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, created, access))


def add_group(parent: Any, name: str) -> Any:
    """Make a group, without the time at which it was made."""
    return h5py.Group(h5py.h5g.create(parent.id, name.encode(), gcpl=_of_group()))


@cache
def _of_group() -> Any:
    created = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    created.set_obj_track_times(False)
    return created


def check_place(path: str | os.PathLike[str], nbytes: int, *, overwrite: bool = False) -> None:
    """Make sure, as far as can be told without writing, that a file of `nbytes` can be made.

    Raises
    ------
    RejectedError
        It exists (without `overwrite`), its folder doesn't or can't be written, or the filesystem
        has no room.

    """
    shown, final = os.fspath(path), os.path.realpath(path)
    folder = os.path.dirname(final)
    if not os.path.isdir(folder):
        raise RejectedError(f"its folder {folder} doesn't exist", fix="make it", file=shown)
    if os.path.isdir(final):
        raise RejectedError("is a folder", fix="name a file", file=shown)
    if os.path.lexists(final) and not overwrite:
        raise RejectedError(
            "exists already", fix="name another file, or use --overwrite", file=shown
        )
    if not os.access(folder, os.W_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        words = os.strerror(number)
        raise RejectedError(f"can't be made: {words}", fix=_fix_of(number), file=shown)
    about = os.statvfs(folder)
    free = about.f_bavail * about.f_frsize
    if nbytes > free:
        raise RejectedError(
            f"needs {nbytes / 1e9:.3f} GB, and {folder} has {free / 1e9:.3f} GB free",
            fix="free some space, or write to another filesystem",
            file=shown,
        )


def _reserve(fd: int, nbytes: int) -> None:
    """Reserve the blocks of a file now, where the filesystem can.

    `os.posix_fallocate` would write to every block where it can't: hours on a parallel filesystem.
    """
    size = ctypes.c_int64
    if _libc.fallocate(fd, 0, size(0), size(nbytes)) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))


def _reason(error: OSError | RuntimeError) -> tuple[int, str]:
    """Errno and words; HDF5 has both in the middle of a long message."""
    found = re.search(r"errno = (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None) or 0
    return number, os.strerror(number) if number else str(error)


def _fix_of(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or write to another filesystem"
    if number == errno.EROFS:
        return "write to another filesystem, or mount this one for writing"
    if number in (errno.EACCES, errno.EPERM):
        return "check who may write there"
    return "check the path and the filesystem"


def sync_folder(folder: str) -> None:
    """Make a rename in `folder` survive a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocate(group: Any, name: str, shape: tuple[int, ...], stored: Any) -> int:
    """Make a contiguous dataset, allocated now and not filled; return its offset in the file."""
    offset: int = _allocate(group.id, name, shape, stored).get_offset()
    return offset


def _allocate(group: Any, name: str, shape: tuple[int, ...], stored: Any) -> Any:
    return h5py.h5d.create(group, name.encode(), stored, _space(shape), _of_dataset())


@cache
def _of_dataset() -> Any:
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_layout(h5py.h5d.CONTIGUOUS)
    created.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    created.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    created.set_obj_track_times(False)
    return created


@lru_cache(1024)
def _space(shape: tuple[int, ...]) -> Any:
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


@cache
def _number(dtype: np.dtype[Any]) -> Any:
    return h5py.h5t.py_create(dtype)


@lru_cache(1024)
def _text(nbytes: int) -> Any:
    stored = h5py.h5t.C_S1.copy()
    stored.set_size(nbytes)
    stored.set_cset(h5py.h5t.CSET_UTF8)
    stored.set_strpad(h5py.h5t.STR_NULLPAD)
    return stored


def write_array(group: Any, name: str, array: np.ndarray[Any, Any]) -> None:
    """Make a dataset of a whole array: integers, IEEE floats, text of fixed length."""
    offset = allocate(group, name, array.shape, h5py.h5t.py_create(array.dtype))
    write_exactly(group.file.id.get_vfd_handle(), offset, array.view(np.uint8).data)


class _Attribute(NamedTuple):
    """An attribute as HDF5 takes it, for one object or many."""

    name: bytes
    data: np.ndarray[Any, Any]
    stored: Any
    space: Any


def _attribute(name: str, value: Value | np.ndarray[Any, Any]) -> _Attribute:
    """Prepare an attribute; text with its length fixed, in UTF-8.

    Text of variable length would lie in a heap that carries no checksum.
    """
    if isinstance(value, str):
        data = np.array(value.encode(errors="surrogateescape"))
        stored = _text(max(1, data.dtype.itemsize))
    else:
        data = np.asarray(value)
        stored = _number(data.dtype)
    return _Attribute(name.encode(), data, stored, _space(data.shape))


def _put_attribute(target: Any, attribute: _Attribute) -> None:
    name, data, stored, space = attribute
    h5py.h5a.create(target, name, stored, space).write(data, mtype=stored)


def put_attributes(target: Any, attributes: Mapping[str, Value | np.ndarray[Any, Any]]) -> None:
    """Write attributes of an HDF5 object; see `_attribute`."""
    for name, value in attributes.items():
        _put_attribute(target, _attribute(name, value))
