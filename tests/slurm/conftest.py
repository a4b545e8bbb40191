"""One Slurm for all tests of this folder, and one dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from tests.support.mpirun import mpirun
from tests.support.slurm import Slurm, slurm, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of four processors and two GPUs, or a skipped test."""
    if reason := why_not():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=4, gpus=2) as running:
        yield running


@pytest.fixture(autouse=True)
def quiet(cluster: Slurm) -> Iterator[None]:
    """Leave no job of one test to the next."""
    yield
    cluster.clear()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve items."""
    path = tmp_path_factory.mktemp("data") / "data.h5"
    options = "--items 12 --lengths 100:400 --q-heads 4 --kv-heads 2 --head-dim 32 --causal"
    assert main(["make-data", str(path), *options.split()]) == 0
    return path


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make of it when nobody interferes."""
    path = tmp_path_factory.mktemp("undisturbed") / "out.h5"
    mpirun(2, ["-m", "mdattn_mpi", "run", str(data), "-o", str(path), *RUN], check=True)
    return path


RUN = ("-b", "cpu", "-s", "ring", "--threads", "1")
