"""A rank is lost, or the job refused, before there is an output."""

from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.lockstep import death_note
from tests.support.mpirun import mpirun


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.h5"
    assert main(["make-data", str(path), "--items", "2", "--length", "30", "--head-dim", "16"]) == 0
    return path


@pytest.mark.parametrize(
    ("kind", "phase", "rank"),
    [("kill", "dataset", 1), ("sleep", "backend", 0), ("exit0", "plan", 2), ("stop", "output", 1)],
)
def test_a_rank_lost_while_opening_is_named(data: Path, kind: str, phase: str, rank: int) -> None:
    out = data.with_name("out.h5")
    command = ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), "-b", "cpu"]
    lost = mpirun(3, [*command, "--deadline", "8", "--chaos", f"{kind}@{phase}::{rank}"])
    note = death_note.read(f"{out}.run")
    assert lost.returncode == 75, lost.stderr
    assert note is not None
    assert (note["rank"], note["phase"]) == (rank, phase)
    assert mpirun(3, command).returncode == 0
    assert (Path(f"{out}.run") / "death-note.1.txt").exists()


def test_a_refused_job_leaves_nothing(data: Path) -> None:
    with data.open("rb+") as file:
        file.truncate(data.stat().st_size // 2)
    before = set(data.parent.iterdir())
    done = mpirun(2, ["-m", "mdattn_mpi", "run", str(data), "-o", str(data.with_name("out.h5"))])
    assert done.returncode == 2, done.stderr
    assert set(data.parent.iterdir()) == before


def test_a_refusal_keeps_what_an_earlier_run_left(data: Path) -> None:
    out = data.with_name("out.h5")
    run = ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), "-b", "cpu"]
    assert mpirun(2, run).returncode == 0
    log = (Path(f"{out}.run") / "rank-0000.log").read_text()
    assert mpirun(2, [*run, "--lse"]).returncode == 2  # another job
    assert (Path(f"{out}.run") / "rank-0000.log").read_text().startswith(log)
