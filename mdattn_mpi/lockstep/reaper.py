"""A process that kills the launcher when it doesn't end after its ranks have.

Open MPI's mpirun may hang once its last rank is dead: seldom (once in some 550 kill storms here)
its PMIx server, while it is torn down, waits for a lock that nobody releases (Open MPI 5.0.11, seen
in a debugger). It holds the allocation then, and nothing of ours is left that could
say so. So the first rank of a node has a reaper: a process without files, asleep until the watchdog
is gone. If the rank had not left the world in order by then, and mpirun is still there long after
the last process that it started, the reaper kills it.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from mdattn_mpi.lockstep import death_note
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.launcher import ONE_JOB, Launcher
from mdattn_mpi.lockstep.process import Process, name_this, set_death_signal
from mdattn_mpi.lockstep.record import ENDED

PATIENCE = 20.0  # seconds; an mpirun in order ends a fraction of one after its last rank
_LOOK = 0.1
_GONE = signal.SIGRTMIN + 8  # sent by the kernel when the watchdog is gone


def post(launched: Launcher, board: Board) -> None:
    """Fork the reaper of this process's launcher, where that is Open MPI's and this the first rank.

    Must be called before a thread exists. The reaper never returns from here.
    """
    if launched.speaks != "Open MPI" or launched.local_rank > 0:
        return
    launcher = Process.look(os.getppid())
    if launcher is None or launcher.name not in ONE_JOB:
        return
    watchdog = os.getpid()
    if os.fork() == 0:
        try:
            wait_and_reap(launcher, watchdog, board)
        finally:
            os._exit(0)


def wait_and_reap(
    launcher: Process, watchdog: int, board: Board, patience: float = PATIENCE
) -> None:
    """Sleep until the process `watchdog` is gone; then make sure that the launcher ends too."""
    os.setsid()  # signals to the group of a rank are not for the reaper
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    name_this("mdattn-reaper")
    _close_files()
    set_death_signal(_GONE)
    while os.getppid() == watchdog:
        signal.sigwait({_GONE})
    record = board.record()
    if record.state != ENDED and outlives_its_ranks(launcher, patience):
        os.kill(launcher.pid, signal.SIGKILL)
        if record.folder:
            death_note.add(
                record.folder,
                f"{launcher.name} (pid {launcher.pid} on {record.host}) was still there "
                f"{patience:g} s after the last process that it had started, and was killed.",
            )


def outlives_its_ranks(launcher: Process, patience: float) -> bool:
    """Wait for the launcher's end; True if it is there `patience` seconds after its children."""
    since = time.monotonic()
    while (now := Process.look(launcher.pid)) and now.is_alive and now.start == launcher.start:
        if time.monotonic() - since > patience:
            if now.state not in "Tt" and not _has_children(launcher):  # a debugger may hold it
                return True
            since = time.monotonic()
        time.sleep(_LOOK)
    return False


def _has_children(launcher: Process) -> bool:
    """Whether something that the launcher has started still runs."""
    everyone = (Process.look(int(folder.name)) for folder in Path("/proc").glob("[0-9]*"))
    return any(found.is_alive and found.parent == launcher.pid for found in everyone if found)


def _close_files() -> None:
    """Hold no end of a pipe: a launcher waits for the end of its ranks' output."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the list itself
            os.close(number)
    for _ in ("stdin", "stdout", "stderr"):
        os.open(os.devnull, os.O_RDWR)
