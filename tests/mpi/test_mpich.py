"""The same Python environment under MPICH: mpi4py takes the library that it is told to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from mdattn_mpi.cli import main
from tests.support.mpirun import launcher, mpirun
from tests.support.storm import results

PREFIX = Path(sys.prefix) / "mpich"  # where `make test` puts the wheel
MPIRUN = PREFIX / "bin" / "mpirun"
LIBRARY = {"MPI4PY_LIBMPI": str(PREFIX / "lib" / "libmpi.so.12")}
RUN = ("-b", "cpu", "--threads", "1")

pytestmark = pytest.mark.skipif(
    not MPIRUN.exists(),
    reason=f"there is no MPICH: pip install --no-deps --prefix {PREFIX} mpich",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.h5"
    options = "--items 6 --lengths 20:500 --q-heads 4 --kv-heads 2 --head-dim 32 --causal"
    assert main(["make-data", str(path), *options.split()]) == 0
    return path


def under_mpich(ranks: int, arguments: Sequence[str], **more: bool) -> CompletedProcess[str]:
    program = (str(MPIRUN),)
    return mpirun(ranks, ["-m", "mdattn_mpi", *arguments], program=program, env=LIBRARY, **more)


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
def test_the_bytes_are_those_of_open_mpi(strategy: str, data: Path, tmp_path: Path) -> None:
    outs = tmp_path / "mpich.h5", tmp_path / "other.h5"
    job = [("run", str(data), "-o", str(out), "-s", strategy, *RUN) for out in outs]
    under_mpich(3, job[0], check=True)
    mpirun(3, ["-m", "mdattn_mpi", *job[1]], check=True)
    assert results(outs[0]) == results(outs[1])


def test_groups(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    arguments = ("run", str(data), "-o", str(out), "--group-size", "1", *RUN)
    assert "3 groups of 1 rank" in under_mpich(3, arguments, check=True).stderr
    assert main(["verify", str(out), "--data", str(data)]) == 0


def test_a_killed_rank_ends_the_job(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    arguments = ("run", str(data), "-o", str(out), *RUN)
    done = under_mpich(2, (*arguments, "--chaos", "kill@enqueue:#2:1"))
    assert done.returncode != 0
    assert "rank 1" in done.stderr
    assert "SIGKILL" in done.stderr
    under_mpich(2, arguments, check=True)
    assert main(["verify", str(out), "--data", str(data)]) == 0


def test_doctor(tmp_path: Path) -> None:
    done = under_mpich(2, ("doctor", "--folder", str(tmp_path)))
    assert done.returncode in (0, 1), done.stdout
    assert "mpirun of MPICH or Intel MPI: 2 ranks on 1 node" in done.stdout
    assert "OK    MPI library    MPICH" in done.stdout


def test_a_launcher_of_the_other_mpi_is_named(data: Path, tmp_path: Path) -> None:
    arguments = ("run", str(data), "-o", str(tmp_path / "out.h5"), *RUN)
    if "--oversubscribe" not in launcher():
        pytest.skip("mpirun is that of MPICH itself")
    crossed = mpirun(2, ["-m", "mdattn_mpi", *arguments], env=LIBRARY)
    assert crossed.returncode == 2
    assert "by the mpirun of Open MPI, but mpi4py uses MPICH" in " ".join(crossed.stderr.split())
    assert not (tmp_path / "out.h5").exists()
