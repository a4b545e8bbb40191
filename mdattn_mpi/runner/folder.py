"""The run folder: logs, summary, death note, and the board on which watchdogs meet."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.lockstep import World, together
from mdattn_mpi.runner.job import run_folder
from mdattn_mpi.runner.jobspec import JobSpec

LOCK = "lock"
LOCK_PATIENCE = 5.0  # seconds: the job before this one may still be dying


@contextmanager
def watched_folder(spec: JobSpec, world: World) -> Iterator[None]:
    """Collective. Have the run folder before anything slow begins: engines take minutes to build.

    No other job gets it meanwhile: two that write one output would spoil it.
    A job that is refused before it has an output leaves no folder behind. Without a place for it
    (or for a dry run) there is none; what comes later says what is wrong with the place.
    """
    folder = run_folder(spec)
    made, lock = False, None

    def make() -> None:
        nonlocal made, lock
        with suppress(OSError):
            folder.mkdir()
            made = True
        if folder.is_dir():
            lock = _lock(folder)

    if not spec.dry_run:
        together(world, "run folder", lambda: make() if world.rank == 0 else None)
        if folder.is_dir():
            world.board.attach(folder, world.rank, world.size)
    try:
        yield
    except MdattnError as error:
        if error.agreed:
            _leave_no_trace(spec, world, made)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Keep other jobs out as long as the returned file is open; None where files can't be locked.

    The kernel gives the lock back when the process dies, however it does. See flock(2).
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None  # what comes later says what is wrong with the place
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(lock)
                return None  # such as Lustre that is mounted without -o flock
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            holder = os.pread(lock, 4096, 0).decode(errors="replace") or "somebody"
            os.close(lock)
            raise RejectedError(
                f"another job is writing this output: {holder}",
                file=str(folder / LOCK),
                fix="wait for it or stop it (`mdattn status` shows it), or name another output",
            ) from None
        with suppress(OSError):  # the disk is full: nobody will know who holds it
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {os.getpid()} on {os.uname().nodename}".encode(), 0)
        return lock


def _leave_no_trace(spec: JobSpec, world: World, made: bool) -> None:
    """Collective. Remove a folder that was made for nothing."""
    forsaken = not Path(spec.output).exists()
    if forsaken:
        world.board.detach()
    world.barrier()
    if made and forsaken:
        shutil.rmtree(run_folder(spec), ignore_errors=True)
