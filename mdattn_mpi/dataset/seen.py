"""Whether a file is still the one that was looked at before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mdattn_mpi.dataset.kinds import must_be_regular
from mdattn_mpi.dataset.positioned import read_exactly

FINGERPRINT_BLOCKS = 256
FINGERPRINT_BYTES = 4096


class Seen(NamedTuple):
    """A file as it was at some time; equal to how it is as long as nobody has touched it.

    A program that writes it may set the time of modification back, but not ``changed``, that of the
    inode, which the file system keeps: see stat(2). The fingerprint guards against a file system
    that doesn't. The number of the device isn't here, because it differs between nodes.
    """

    path: str
    inode: int
    size: int
    modified: int  # in nanoseconds
    changed: int
    fingerprint: str

    @staticmethod
    def of(path: str, about: os.stat_result, fingerprint: str) -> Seen:
        """Put together what was found out about a file."""
        times = about.st_mtime_ns, about.st_ctime_ns
        return Seen(os.path.realpath(path), about.st_ino, about.st_size, *times, fingerprint)


def look(path: str) -> Seen:
    """Look at a file as it is now.

    Raises
    ------
    RejectedError, OSError
        It isn't there, isn't a file, or can't be read.

    """
    must_be_regular(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Seen.of(path, os.fstat(fd), fingerprint_of([fd]))
    finally:
        os.close(fd)


def fingerprint_of(fds: Iterable[int]) -> str:
    """SHA-256 over the sizes of open files and some blocks of each, the first and last among them.

    Raises
    ------
    OSError
        One of them can't be read.

    """
    digest = hashlib.sha256()
    for fd in fds:
        size = os.fstat(fd).st_size
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - FINGERPRINT_BYTES)
        blocks = min(FINGERPRINT_BLOCKS, -(-size // FINGERPRINT_BYTES))
        for block in range(blocks):
            content = np.empty(min(size, FINGERPRINT_BYTES), np.uint8)
            read_exactly(fd, last * block // max(1, blocks - 1), content)
            digest.update(content.data)
    return digest.hexdigest()
