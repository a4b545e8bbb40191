"""What a file is, by its first bytes: so that a refusal names it, and what to do with it."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO, NamedTuple

from mdattn_mpi.errors import RejectedError


class Kind(NamedTuple):
    """What a file is, in words, and what to do with one that isn't what was wanted."""

    name: str
    fix: str


_UNPACK = "unpack it first"
_CONVERT = "make a dataset of it with `mdattn convert`"
_EXPORT = "save its tensors as .safetensors, .npz or HDF5 with the program that reads it"
_TOKENIZE = f"{_EXPORT}; if it holds texts for a model, name its tokenizer: --tokenizer DIR"
NPY = Kind("a .npy array", _CONVERT)
NPZ = Kind("a .npz archive", _CONVERT)
SAFETENSORS = Kind("a .safetensors file", _CONVERT)
TORCH = Kind("a PyTorch file (.pt)", _CONVERT)
TORCH_OR_PICKLE = Kind("a pickle, maybe an old .pt", _CONVERT)
HDF5 = Kind("HDF5", "")
UNKNOWN = Kind("of an unknown kind", _EXPORT)
ZIP = Kind("a zip archive, but neither .npz nor .pt", _UNPACK)

_STARTS = {
    b"\x93NUMPY": NPY,
    b"\x80\x02": TORCH_OR_PICKLE,
    b"\x80\x03": TORCH_OR_PICKLE,
    b"\x80\x04": TORCH_OR_PICKLE,
    b"\x80\x05": TORCH_OR_PICKLE,
    b"\x1f\x8b": Kind("compressed by gzip", _UNPACK),
    b"BZh": Kind("compressed by bzip2", _UNPACK),
    b"\xfd7zXZ\0": Kind("compressed by xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": Kind("compressed by zstd", _UNPACK),
    b"PAR1": Kind("a Parquet file", _TOKENIZE),
    b"ARROW1": Kind("an Arrow file", _EXPORT),
    b"GGUF": Kind("a GGUF file", _EXPORT),
    b"CDF": Kind("a netCDF-3 file", "rewrite it as netCDF-4, which is HDF5: nccopy -k nc4"),
    b"MATLAB 5.0": Kind("a MATLAB 5 file", "save it with -v7.3, which is HDF5"),
}


def kind_of(path: str) -> Kind:
    """Look at the first bytes of a file; whether it is whole shows when it is read.

    Raises
    ------
    OSError
        It can't be read.

    """
    with open(path, "rb") as file:
        start = file.read(512)
        if _has_superblock(file):
            return HDF5
    if not start:
        return Kind("empty", "copy it again, or make a new one")
    for magic, kind in _STARTS.items():
        if start.startswith(magic):
            return kind
    if start.startswith(b"PK"):
        return _kind_of_zip(path)
    if start[8:9] == b"{":
        return SAFETENSORS
    if start[257:262] == b"ustar":
        return Kind("a tar archive", _UNPACK)
    if start and all(byte in b"\t\r\n" or byte >= 32 for byte in start):
        return Kind("text", _TOKENIZE)
    return UNKNOWN


def _has_superblock(file: BinaryIO) -> bool:
    """Whether a file is HDF5, maybe behind a user block: of 512 bytes, or 1024, 2048, …"""
    at, size = 0, file.seek(0, os.SEEK_END)
    while at < size:
        file.seek(at)
        if file.read(8) == b"\x89HDF\r\n\x1a\n":
            return True
        at = max(512, 2 * at)
    return False


def _kind_of_zip(path: str) -> Kind:
    """PyTorch and NumPy both write zip archives, with members of their own."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return Kind("a damaged zip archive", "copy it again")
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return TORCH
    return NPZ if all(name.endswith(".npy") for name in names) else ZIP


def must_be_regular(path: str) -> None:
    """Refuse a path that doesn't lead to a regular file: opening a pipe could hang.

    Raises
    ------
    RejectedError
        It isn't there, or is something else.

    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RejectedError(f"can't be opened: {reason}", fix="check the path", file=path) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise RejectedError(f"is {kind}", fix="name a file", file=path)
