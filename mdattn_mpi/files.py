"""Files that appear whole or not at all, and folders that only their owner may write."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a new file beside `path`; it replaces `path` when the block ends well.

    It is on the disk by then. When the block fails, nothing is left of it.

    Raises
    ------
    OSError
        The folder can't be written, or has no room.

    """
    with _replacing(path) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Do as `whole_file`, for a block that syncs."""
    temporary = path.with_name(f".{os.urandom(4).hex()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):  # it is in place, or was never made
            temporary.unlink()


def write_whole(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file, or replace it, whole or not at all; see `whole_file`."""
    with _replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sha256_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 in hex over the bytes of files, one after the other.

    Raises
    ------
    OSError
        One can't be read.

    """
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.hexdigest()


def cache_folder(name: str) -> Path:
    """Folder `name` in ``$MDATTN_CACHE``, else in ``mdattn`` in the user's cache folder."""
    named = os.environ.get("MDATTN_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else base / "mdattn") / name


def is_private(folder: Path) -> bool:
    """Whether a folder is the user's own, and nobody else may write into it."""
    found = folder.stat()
    writable_by_others = stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid == os.geteuid() and not writable_by_others
