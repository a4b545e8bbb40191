"""The reaper: an mpirun that hangs after a lost job is killed, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mdattn_mpi.lockstep import reaper
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.launcher import Launcher
from mdattn_mpi.lockstep.process import Process

# A launcher that starts a watchdog, which posts a reaper and dies; "other" is one more process.
LAUNCHER = """
import mmap, os, sys, time
from mdattn_mpi.lockstep import reaper
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.process import Process
from mdattn_mpi.lockstep.record import PAGE

launcher, folder, other, ended = Process.look(os.getpid()), *sys.argv[1:]
board = Board(mmap.mmap(-1, PAGE))
board.attach(folder, 0, 2)
if float(other) and os.fork() == 0:
    time.sleep(float(other))
    os._exit(0)
if os.fork() == 0:
    watchdog = os.getpid()
    standing = os.fork()
    if standing == 0:
        reaper.wait_and_reap(launcher, watchdog, board, patience=0.5)
        os._exit(0)
    print(standing, flush=True)
    sys.stdin.readline()
    if ended == "ended":
        board.end()
    os._exit(75)
{after}
"""
HANGS = "time.sleep(1000)"
ENDS = "os.wait()"


Lost = tuple[int, float, subprocess.Popen[str]]


@contextmanager
def lost(folder: Path, after: str, *, other: float = 0, ended: str = "") -> Iterator[Lost]:
    """A launcher whose watchdog has just died; the reaper's pid and the time go with it."""
    code = LAUNCHER.replace("{after}", after)
    command = [sys.executable, "-c", code, str(folder), str(other), ended]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        standing = int(process.stdout.readline())
        time.sleep(0.2)
        assert is_alive(standing)
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            yield standing, time.monotonic(), process
        finally:
            process.kill()


def is_alive(pid: int) -> bool:
    found = Process.look(pid)
    return found is not None and found.is_alive


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_launcher_that_hangs_after_a_lost_rank_is_killed(tmp_path: Path) -> None:
    with lost(tmp_path, HANGS) as (standing, _, process):
        assert process.wait(30) == -signal.SIGKILL
        assert gone(standing, 10)
    note = (tmp_path / "death-note.txt").read_text()
    assert f"(pid {process.pid} on {os.uname().nodename}) was still there 0.5 s after" in note


def test_one_that_still_runs_something_is_left_alone_until_that_ends(tmp_path: Path) -> None:
    with lost(tmp_path, HANGS, other=3) as (_, since, process):
        assert process.wait(30) == -signal.SIGKILL
        assert time.monotonic() - since > 2


def test_one_that_is_stopped_is_left_alone(tmp_path: Path) -> None:
    with lost(tmp_path, "os.kill(os.getpid(), 19); time.sleep(1000)") as (standing, _, process):
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == -signal.SIGKILL
        assert gone(standing, 10)


def test_one_that_ends_takes_the_reaper_with_it(tmp_path: Path) -> None:
    with lost(tmp_path, ENDS) as (standing, _, process):
        assert process.wait(30) == 0
        assert gone(standing, 10)
    assert not (tmp_path / "death-note.txt").exists()


def test_after_a_world_that_was_left_in_order_nobody_is_killed(tmp_path: Path) -> None:
    with lost(tmp_path, HANGS, ended="ended") as (standing, _, process):
        assert gone(standing, 10)
        time.sleep(1)
        assert process.poll() is None


@pytest.mark.parametrize(
    ("launched", "name"),
    [
        (Launcher("mpirun", 0, 2, 0, 2, "Open MPI"), "bash"),  # a script between the two
        (Launcher("mpirun", 0, 2, 0, 2, "Open MPI"), "prted"),  # may belong to more than one job
        (Launcher("mpirun", 1, 2, 1, 2, "Open MPI"), "prterun"),
        (Launcher("mpirun", 0, 2, 0, 2, "MPICH or Intel MPI"), "mpirun"),
        (Launcher("srun", 0, 2, 0, 2, "Slurm"), "slurmstepd"),
        (Launcher(), "bash"),
    ],
)
def test_no_reaper_is_posted(
    launched: Launcher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "look", lambda pid: Process(pid, name, "S", 1, 7))
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a reaper was posted"))
    reaper.post(launched, Board())


def test_a_process_is_told_from_a_later_one_of_the_same_pid() -> None:
    own = Process.look(os.getpid())
    assert own is not None
    assert (own.pid, own.parent, own.is_alive) == (os.getpid(), os.getppid(), True)
    assert not reaper.outlives_its_ranks(own._replace(start=own.start + 1), patience=0.0)
    assert Process.look(2**22 + 1) is None
