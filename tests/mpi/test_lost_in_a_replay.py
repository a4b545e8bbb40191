"""A rank is lost inside a recorded step: a graph that waits for it is a wait like any other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.lockstep import death_note
from tests.support.mpirun import mpirun
from tests.support.replay_job import FIRST


def job(folder: Path, *options: str) -> Any:
    return mpirun(2, ["-m", "tests.support.replay_job", str(folder), *options])


def test_nobody_is_lost(tmp_path: Path) -> None:
    """The control: the same steps are replayed by both ranks, and are right."""
    done = job(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("replayed 5 of 6 calls\n") == 2


@pytest.mark.parametrize(
    ("fault", "what"), [(signal.SIGKILL, "killed by signal 9"), (signal.SIGSTOP, "was stopped")]
)
def test_a_lost_rank_ends_the_job_and_is_named(tmp_path: Path, fault: int, what: str) -> None:
    done = job(tmp_path, "--lose", str(int(fault)), "--deadline", "2")
    assert done.returncode == 75, done.stderr
    note = death_note.read(tmp_path)
    assert note is not None
    assert what in note["what"]
    assert (note["rank"], note["phase"], note["item"]) == (1, "enqueue", f"item-{FIRST}")
    (other,) = note["waited"]  # for its graph, which the host waits for
    assert (other["rank"], other["phase"], other["item"]) == (0, "collect", f"item-{FIRST}")
    assert "replayed" not in done.stdout
