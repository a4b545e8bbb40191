"""A rank is lost: the job ends everywhere, the right rank is named, and nothing is left behind.

The job is `tests.support.small_job`: the phases of the real loop, without files and attention.
"""

import itertools
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.lockstep import death_note
from mdattn_mpi.lockstep.board import BoardFile
from mdattn_mpi.lockstep.chaos import DEADLY
from tests.support.mpirun import (
    CRASHES,
    is_open_mpi,
    kill_all,
    mark_of,
    mpirun,
    orphans,
    processes,
    start,
)
from tests.support.small_job import PHASES

JOB = ["-m", "tests.support.small_job"]
DEADLINE = 2.0

# What the note says of each kind, and what mpirun then exits with.
SAID = {
    "kill": ("killed by signal 9", 75),
    "stop": ("was stopped", 75),
    "segfault": ("killed by signal 11", 75),
    "exit0": ("called sys.exit(0)", 75),
    "exit3": ("exited with code 3", 75),
    "raise": ("raised RuntimeError: chaos", 4),
    "raise-thread": ("raised RuntimeError: chaos", 4),
    "hold-gil": ("passed its deadline", 75),
    "sleep": ("passed its deadline", 75),
}
# Every kind, every phase; all of their pairs where MDATTN_THOROUGH is set.
ATTACHED = [phase for phase in PHASES if phase not in ("start", "open")]
PAIRS = sorted(
    {
        *zip(DEADLY, itertools.cycle(ATTACHED), strict=False),
        *zip(DEADLY[::-1], ATTACHED, strict=False),
    }
    if "MDATTN_THOROUGH" not in os.environ
    else itertools.product(DEADLY, ATTACHED)
)


def job(folder: Path, ranks: int, *options: str, **changes: Any) -> Any:
    command = [*JOB, str(folder), "--deadline", str(DEADLINE), *options]
    return mpirun(ranks, command, **changes)


@pytest.mark.parametrize(("kind", "phase"), PAIRS)
def test_a_lost_rank_ends_the_job_and_is_named(tmp_path: Path, kind: str, phase: str) -> None:
    lost = ATTACHED.index(phase) % 3
    item = "" if phase == "end" else "item-1"
    done = job(tmp_path, 3, "--chaos", f"{kind}@{phase}:{item}:{lost}")
    what, code = SAID[kind]
    note = death_note.read(tmp_path)
    assert note is not None, done.stderr
    assert what in note["what"]
    assert (note["rank"], note["phase"], note["item"]) == (lost, phase, item)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(death_note.message(note)) == 1
    assert done.stderr.count("mdattn: rank") == 1
    assert (note["done"], note["total"]) == (3 if phase == "end" else 1, 3)
    assert {other["rank"] for other in note["waited"]} == {0, 1, 2} - {lost}
    if kind in ("segfault", "raise", "hold-gil", "sleep"):
        assert "chaos.py" in note["stack"]


UNREACHED = "PMIX ERROR: PMIX_ERR_UNREACH"  # what it says then


@pytest.mark.parametrize("kind", ["kill", "sleep", "exit0", "raise"])
@pytest.mark.parametrize("phase", ["start", "open"])
def test_before_there_is_a_run_folder_it_ends_all_the_same(
    tmp_path: Path, kind: str, phase: str
) -> None:
    # MPI itself takes a while to start on a busy machine.
    done = job(tmp_path, 2, "--deadline", "8", "--chaos", f"{kind}@{phase}::1")
    # Open MPI's mpirun may crash, or hang and be reaped, when a rank is lost while others start.
    broken = phase == "start" and done.returncode in CRASHES and UNREACHED in done.stderr
    assert broken or done.returncode == SAID[kind][1], done.stderr
    said = " ".join(done.stderr.split())
    assert SAID[kind][0] in said
    # No rank can read here what another one does: who waits for a sleeper may be the first to end.
    lost = "[01]" if (kind, phase) == ("sleep", "start") else "1"
    assert re.search(f"rank {lost} of 2", said)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_same_command_resumes(tmp_path: Path, ranks: int) -> None:
    lost = job(tmp_path, ranks, "--chaos", f"kill@write:item-1:{ranks - 1}")
    assert lost.returncode == 75
    done = job(tmp_path, ranks)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text().split() == ["item-0", "item-1", "item-2"]
    assert death_note.read(tmp_path) is None
    assert (tmp_path / "death-note.1.txt").exists()


@pytest.mark.parametrize("kind", ["kill", "exit0", "hold-gil"])
def test_the_others_end_without_the_launchers_help(tmp_path: Path, kind: str) -> None:
    """As under srun without -K1: mpirun is told to let the others go on."""
    options = (
        ["--runtime-options", "error-nonzero-status=0"]
        if is_open_mpi()
        else ["-disable-auto-cleanup"]
    )
    done = job(tmp_path, 3, "--chaos", f"{kind}@enqueue:item-1:2", options=options)
    note = death_note.read(tmp_path)
    assert note is not None, done.stderr
    assert note["rank"] == 2
    assert done.stderr.count("mdattn: rank 2") == 1


def started(folder: Path, ranks: int, **changes: Any) -> Any:
    """Start an endless job; return when all its ranks work."""
    command = [*JOB, str(folder), "--items", "100000", "--step", "0.01"]
    process = start(ranks, command, **changes)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        records = BoardFile(folder).records()
        if len(records) == ranks and all(record.done for record in records):
            return process
        time.sleep(0.05)
    kill_all(mark_of(process))
    raise AssertionError(f"the job never began: {process.communicate()}")


def ended(process: Any, timeout: float = 60) -> tuple[int, str]:
    """Wait for the end of a run; its exit code and what it said; nothing is left."""
    try:
        _, err = process.communicate(timeout=timeout)
        left = orphans(mark_of(process))
    finally:
        kill_all(mark_of(process))
    assert not left, err
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_all_ranks_at_the_same_item(tmp_path: Path, number: int) -> None:
    process = started(tmp_path, 3)
    process.send_signal(number)  # mpirun passes it on
    code, err = ended(process)
    assert code == 75, err
    stops = {line.split("before ")[1] for line in err.splitlines() if "stops before" in line}
    assert len(stops) == 1, err
    finished = (tmp_path / "done").read_text().split()
    assert stops == {f"item-{len(finished)}"}
    assert death_note.read(tmp_path) is None


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    process = started(tmp_path, 3)
    os.kill(BoardFile(tmp_path).records()[1].pid, signal.SIGTERM)
    code, err = ended(process)
    assert code == 75, err
    assert err.count("stops before") == 3


def test_a_watchdog_that_is_killed_is_noticed_by_the_others(tmp_path: Path) -> None:
    process = started(tmp_path, 3)
    os.kill(BoardFile(tmp_path).records()[2].watchdog_pid, signal.SIGKILL)
    code, err = ended(process)
    note = death_note.read(tmp_path)
    assert code
    assert note is not None, err
    assert note["rank"] == 2
    assert "vanished" in note["what"]


def test_without_mpirun_nobody_stays(tmp_path: Path) -> None:
    process = started(tmp_path, 3)
    launchers = [
        pid
        for pid, name in processes(mark_of(process)).items()
        if name.startswith(("prte", "mpirun"))
    ]
    assert launchers
    for pid in launchers:
        os.kill(pid, signal.SIGKILL)
    _, err = ended(process)
    assert not err or "lost its launcher" in err


SLOW = """
import sys, time
from mdattn_mpi.lockstep import board, watch
def main():
    from mdattn_mpi.lockstep import Step, start
    with start() as world:
        world.board.attach({folder!r}, world.rank, world.size)
        for turn in range(3):
            if world.rank == 1:
                for phase in range(3):
                    world.board.enter("read", deadline=1.5)
                    time.sleep(1.0)
            world.board.enter("agree", deadline=1.5)
            world.agree(Step(turn, "begin", 0))
    return 0
sys.exit(watch(main))
"""


def test_who_waits_for_a_slow_rank_that_is_in_time_waits_on(tmp_path: Path) -> None:
    """The others are past their own deadline in every turn; the slow rank never is."""
    done = mpirun(2, ["-c", SLOW.format(folder=str(tmp_path))])
    assert done.returncode == 0, done.stderr
    assert death_note.read(tmp_path) is None


LEFT_ALONE = """
import sys
from mdattn_mpi.lockstep import board, watch
from mdattn_mpi.errors import ItemError, RejectedError
def main():
    from mdattn_mpi.lockstep import Step, start
    world = start()
    world.board.attach({folder!r}, world.rank, world.size)
    error = RejectedError("no such thing", fix="bring it") if world.rank == 1 else None
    world.agree(Step(0, "open", 0), error=error)
sys.exit(watch(main))
"""


def test_an_error_that_all_agreed_on_is_printed_once_and_is_no_death(tmp_path: Path) -> None:
    done = mpirun(3, ["-c", LEFT_ALONE.format(folder=str(tmp_path))])
    assert done.returncode == 2
    assert done.stderr.count("mdattn: error: rank 1: no such thing. Fix: bring it\n") == 1
    assert death_note.read(tmp_path) is None


RAISES = """
import logging, os, sys
from mdattn_mpi.errors import LOGGER
from mdattn_mpi.lockstep import watch
def go_wrong():
    return {{}}["no such key"]
def main():
    from mdattn_mpi.lockstep import start, together
    world = start()
    world.board.attach({folder!r}, world.rank, world.size)
    if {logged}:
        LOGGER.addHandler(logging.FileHandler(os.path.join({folder!r}, f"log-{{world.rank}}")))
    act = go_wrong if world.rank == 1 else dict
    {way}
    world.barrier()
sys.exit(watch(main))
"""


@pytest.mark.parametrize("way", ["together(world, 'plan', act)", "act()"])
def test_an_exception_of_one_rank_is_shown_once_and_its_log_has_the_traceback(
    tmp_path: Path, way: str
) -> None:
    done = mpirun(2, ["-c", RAISES.format(folder=str(tmp_path), way=way, logged=True)])
    assert done.returncode == 4
    said = " ".join(done.stderr.split())
    assert said.count("KeyError: 'no such key'") == 1
    assert "rank 1" in said
    assert "Traceback" not in said
    if way == "act()":  # the other rank is in a barrier, and hears nothing
        assert "raised KeyError" in (death_note.read(tmp_path) or {})["what"]
    else:
        assert "mdattn: error: rank 1: KeyError: 'no such key' (<string>, line " in said
        assert "a bug in mdattn_mpi" in said
        assert max(map(len, done.stderr.splitlines())) <= 80
        assert death_note.read(tmp_path) is None
    logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
    assert logs[0] == ""
    assert "Traceback" in logs[1]
    assert "in go_wrong" in logs[1]


def test_a_bug_before_there_is_a_log_shows_its_traceback(tmp_path: Path) -> None:
    way = "together(world, 'plan', act)"
    done = mpirun(2, ["-c", RAISES.format(folder=str(tmp_path), way=way, logged=False)])
    assert done.returncode == 4
    assert done.stderr.count("Traceback") >= 1
    assert done.stderr.count("in go_wrong") == 1
    assert done.stderr.count("mdattn: error: rank 1: KeyError") == 1


def test_a_job_that_loses_nobody_says_nothing(tmp_path: Path) -> None:
    done = job(tmp_path, 4)
    assert (done.returncode, done.stderr) == (0, "")
    records = BoardFile(tmp_path).records()
    assert [(record.rank, record.done, record.state) for record in records] == [
        (rank, 3, 2) for rank in range(4)
    ]
