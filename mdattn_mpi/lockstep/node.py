"""Where the watchdogs of one node meet: the same pages as in the run folder, but in memory.

A file that all of them keep open, on a file system of the node's own. Pages of the node's ranks are
as new as their watchdogs show them; those of other ranks are what the node's publisher has fetched.
The publisher is the watchdog that holds the file's lock. The kernel gives the lock back when it
dies, and another one goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from mdattn_mpi.lockstep.board import LOST_MAGIC, Notice, decode, decode_notice
from mdattn_mpi.lockstep.record import PAGE, Record

MEMORY = "/dev/shm"
STALE = (
    3600.0  # seconds without a write, after which a file is left over from a job that was killed
)


class NodeBoard:
    """The pages of a job on one node: of the ranks whose pids mean the same to each other.

    Raises
    ------
    OSError
        There is no place for the file.

    """

    def __init__(self, own: Record) -> None:
        self.job = own.job
        self.folder = own.folder
        self._leads = False
        of = f"{own.folder} {own.job} {own.host} {own.pid_namespace}"
        digest = hashlib.sha256(of.encode(errors="surrogateescape")).hexdigest()
        self._file = self._open(f"mdattn-{os.getuid()}-{digest[:16]}")

    def _open(self, name: str) -> int:
        places = (MEMORY, os.environ.get("TMPDIR", "/tmp"), self.folder)
        _sweep(Path(MEMORY))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        for place in places:
            self._path = Path(place) / name
            with suppress(OSError):
                file = os.open(self._path, flags, 0o600)
                found = os.fstat(file)
                if found.st_uid == os.getuid() and stat.S_ISREG(found.st_mode):
                    return file
                os.close(file)
        raise OSError(f"no file {name} in any of {', '.join(places)}")

    def write(self, rank: int, page: bytes) -> None:
        """Put the page of `rank` where the others of the node read it."""
        os.pwrite(self._file, page, PAGE * (1 + rank))

    def pages(self) -> list[bytes]:
        """All pages in rank order; zeros where nothing has come from."""
        size = os.fstat(self._file).st_size
        whole = os.pread(self._file, size, 0)
        return [whole[at : at + PAGE] for at in range(PAGE, len(whole), PAGE)]

    def records(self) -> list[Record]:
        """Decode the pages that there are."""
        return [record for record in decode(self.pages()) if record.job == self.job]

    def notice(self) -> Notice:
        """A rank is lost; how often somebody here has asked where the ranks of other nodes are."""
        return decode_notice(os.pread(self._file, 24, 0), self.job)

    def announce_loss(self) -> None:
        """Tell all watchdogs of the node that a rank is lost."""
        os.pwrite(self._file, LOST_MAGIC + self.job.to_bytes(8, "little"), 0)

    def ask(self) -> None:
        """Have the publisher find out where the ranks of other nodes are."""
        os.pwrite(self._file, (self.notice().asked + 1).to_bytes(8, "little"), 16)

    def leads(self) -> bool:
        """Whether this watchdog is the node's publisher; it becomes it if nobody is."""
        if not self._leads:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._leads = True
        return self._leads

    def hide(self) -> None:
        """Take the file's name away: who has it open goes on with it, and nothing stays behind."""
        with suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        """Leave it. The name stays: others may be about to open it."""
        os.close(self._file)


def _sweep(place: Path) -> None:
    """Remove what jobs left that were killed before all their ranks had met."""
    for path in place.glob(f"mdattn-{os.getuid()}-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
