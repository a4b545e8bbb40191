"""Another MPI program's ranks, of which one never comes: named after a deadline, with no watchdog.

The last rank is the one that is missed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.test_mpich import LIBRARY, MPIRUN
from tests.support.mpirun import mpirun

PROGRAM = """
import os, sys, time
from mpi4py import MPI
from mdattn_mpi.errors import InterruptedJobError
from mdattn_mpi.lockstep import Step, World
from mdattn_mpi.lockstep.arrival import wait_for_all

comm, folder, deadline = MPI.COMM_WORLD, {folder!r}, {deadline}
missed = comm.rank == comm.size - 1

def join():
    return World.of_program(comm, "attention", deadline)

def leave(text, code):
    with open(os.path.join(folder, str(comm.rank)), "w") as file:
        file.write(text)
    time.sleep(1.0)  # the launcher ends all with the first: let the others write too
    os._exit(code)

wait_for_all(comm, "the start", 60.0)
try:
{body}
except InterruptedJobError as error:
    leave(str(error), error.exit_code)
leave("came through", 0)
"""

BODIES = {
    "never calls": ("if missed: time.sleep(1000)\njoin()", "attention"),
    "exits in order": ("if missed: sys.exit(0)\njoin()", "attention"),
    "stays away from an agreement": (
        """
world = join()
for turn in range(100):
    world.agree(Step(turn, "attention", 7))
if missed: time.sleep(1000)
world.agree(Step(100, "enqueue", 7))
""",
        "enqueue",
    ),
    "stays away from a gathering": (
        """
world = join()
assert world.allgather(world.rank) == list(range(world.size))
if missed: time.sleep(1000)
world.allgather(0)
""",
        "allgather",
    ),
}


def program(folder: Path, body: str, deadline: float) -> list[str]:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return ["-c", PROGRAM.format(folder=str(folder), body=lines, deadline=deadline)]


def said(folder: Path) -> dict[int, str]:
    return {int(path.name): path.read_text() for path in folder.iterdir()}


def error_of(missed: int, what: str) -> str:
    return f"rank {missed} never reached {what} (waited 1 s)"


@pytest.mark.parametrize(("how", "ranks"), [("never calls", 2), *((how, 3) for how in BODIES)])
def test_the_missing_rank_is_named_by_all_others(tmp_path: Path, how: str, ranks: int) -> None:
    body, what = BODIES[how]
    done = mpirun(ranks, program(tmp_path, body, 1.0))
    assert done.returncode == 75, done.stderr
    texts = said(tmp_path)
    assert sorted(texts) == list(range(ranks - 1)), done.stderr
    for text in texts.values():
        assert error_of(ranks - 1, what) in text
        assert "MDATTN_DEADLINE" in text


@pytest.mark.skipif(not MPIRUN.exists(), reason="there is no MPICH; see test_mpich.py")
@pytest.mark.parametrize("how", ["never calls", "stays away from an agreement"])
def test_it_is_named_under_mpich(tmp_path: Path, how: str) -> None:
    body, what = BODIES[how]
    done = mpirun(3, program(tmp_path, body, 1.0), program=(str(MPIRUN),), env=LIBRARY)
    texts = said(tmp_path)
    assert sorted(texts) == [0, 1], done.stderr
    for text in texts.values():
        assert error_of(2, what) in text


def test_a_late_rank_is_waited_for(tmp_path: Path) -> None:
    body = """
world = join()
for turn in range(3):
    if missed: time.sleep(0.5)
    world.agree(Step(turn, "attention", 7))
    world.barrier()
assert world.split(world.rank % 2).deadline == deadline
"""
    done = mpirun(3, program(tmp_path, body, 60.0))
    assert set(said(tmp_path).values()) == {"came through"}, done.stderr


def test_who_comes_after_the_others_have_given_up_is_told(tmp_path: Path) -> None:
    body = """
if missed: time.sleep(3.0)
try:
    join()
except InterruptedJobError as error:
    while not missed and not os.path.exists(os.path.join(folder, "1")): time.sleep(0.1)
    raise
"""
    done = mpirun(2, program(tmp_path, body, 1.0))
    assert done.returncode == 75, done.stderr
    texts = said(tmp_path)
    assert error_of(1, "attention") in texts[0]
    assert "never reached attention" in texts[1]
