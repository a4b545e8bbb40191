"""Opening a file of any kind that `mdattn convert` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from mdattn_mpi.dataset import kinds
from mdattn_mpi.dataset.foreign import hdf5_file, numpy_files, safetensors_file, torch_file
from mdattn_mpi.dataset.foreign.tensor import ForeignFile
from mdattn_mpi.dataset.layout import shown
from mdattn_mpi.errors import MdattnError, RejectedError


def open_files(paths: Sequence[str], stack: ExitStack, allow: Sequence[str] = ()) -> ForeignFile:
    """Open several files as if they were one.

    Raises
    ------
    RejectedError
        As `open_foreign`; or a name is in more than one of them.

    """
    first, *others = (open_foreign(path, stack, allow) for path in paths)
    for path, more in zip(paths[1:], others, strict=True):
        twice = {*first.tensors, *first.groups} & {*more.tensors, *more.groups}
        if twice:
            raise RejectedError(
                f"{shown(min(twice)) or 'the root'!r} is in the files before it too",
                fix="convert them one by one, or rename it",
                file=path,
            )
        for found, added in zip(vars(first).values(), vars(more).values(), strict=True):
            found.update(added)
    return first


def open_foreign(path: str, stack: ExitStack, allow: Sequence[str] = ()) -> ForeignFile:
    """List the tensors of a file by name, and what else has a name.

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
    kinds.must_be_regular(path)
    readers: Mapping[kinds.Kind, Callable[[], ForeignFile]] = {
        kinds.NPY: lambda: numpy_files.read_npy(path),
        kinds.NPZ: lambda: numpy_files.read_npz(path, stack),
        kinds.SAFETENSORS: lambda: safetensors_file.read(path),
        kinds.TORCH: lambda: torch_file.read(path, mapped=True),
        kinds.TORCH_OR_PICKLE: lambda: torch_file.read(path, mapped=False),
        kinds.HDF5: lambda: hdf5_file.read(path, stack, allow),
    }
    try:
        kind = kinds.kind_of(path)
        if kind in readers:
            return readers[kind]()
    except MdattnError:
        raise
    except Exception as error:
        raise RejectedError(
            f"can't be read ({error})", fix="check the path; copy the file again", file=path
        ) from None
    raise RejectedError(f"is {kind.name}", fix=kind.fix, file=path)
