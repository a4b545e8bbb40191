"""Two hosts with addresses of their own: a job over TCP, and one of them cut off in its middle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from tests.support.mpirun import kill_all, launcher, mark_of, mpirun, processes, start
from tests.support.namespaces import Hosts, hosts, why_not
from tests.support.storm import done, results
from tests.support.underway import until

RUN = ("-b", "cpu", "-s", "ring", "--threads", "1")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    if "--oversubscribe" not in launcher():
        pytest.skip("the options are those of Open MPI")
    with hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.h5"
    options = "--items 8 --lengths 100:600 --q-heads 2 --kv-heads 1 --head-dim 32 --causal"
    assert main(["make-data", str(path), *options.split()]) == 0
    return path


def command(data: Path, out: Path, *options: str) -> list[str]:
    return ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), *RUN, *options]


def test_a_job_over_tcp(two: Hosts, data: Path, tmp_path: Path) -> None:
    out, here = tmp_path / "out.h5", tmp_path / "here.h5"
    mpirun(2, command(data, out), program=two.mpirun(launcher()[0]), check=True)
    mpirun(2, command(data, here), check=True)
    assert results(out) == results(here)
    summary = json.loads(Path(f"{out}.run/summary.json").read_text())
    assert [rank["host"] for rank in summary["ranks"]] == two.names


def test_a_ring_of_nodes_over_tcp(two: Hosts, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    words = [
        "-m",
        "mdattn_mpi",
        "run",
        str(data),
        "-o",
        str(out),
        "-s",
        "hierarchical",
        "-b",
        "cpu",
    ]
    program = two.mpirun(launcher()[0], each=2)
    mpirun(4, [*words, "--threads", "1"], program=program, check=True)
    assert main(["verify", str(out), "--data", str(data), "--all"]) == 0
    refused = mpirun(2, [*words, "--overwrite"], program=launcher())
    assert refused.returncode == 2
    assert "several nodes" in refused.stderr


def test_the_doctor_sees_two_nodes(two: Hosts, tmp_path: Path) -> None:
    arguments = ["-m", "mdattn_mpi", "doctor", "--folder", str(tmp_path)]
    done = mpirun(2, arguments, program=two.mpirun(launcher()[0]))
    assert "2 ranks on 2 nodes" in done.stdout, done.stderr
    assert done.returncode == 1, done.stdout
    assert "which one node has for itself" in done.stdout


def test_a_host_is_cut_off(two: Hosts, data: Path, tmp_path: Path) -> None:
    """Nobody can tell anybody anything: each side ends by its own deadline, and a note is left."""
    out, here = tmp_path / "out.h5", tmp_path / "here.h5"
    deadline = 8.0  # opening takes seconds on a busy machine
    process = start(
        2,
        command(data, out, "--chaos", "slow@enqueue", "--deadline", str(deadline)),
        program=two.mpirun(launcher()[0]),
    )
    mark = mark_of(process)
    try:
        until(lambda: done(out) >= 1, 60.0)
        two.cut(two.names[1])
        until(lambda: not ranks_of(mark), deadline + 30.0)
        note = Path(f"{out}.run/death-note.json")
        until(lambda: any(Path(f"{out}.run").glob("death*")), 5.0)
        text = "".join(path.read_text() for path in note.parent.glob("death*"))
        assert "deadline" in text or "launcher" in text, text
        assert any(name in text for name in two.names), text
    finally:
        kill_all(mark)
        process.communicate(timeout=30)
    left = done(out)
    assert 1 <= left < 8
    resumed = mpirun(2, command(data, out), check=True)
    assert f"resuming: {left} of 8" in resumed.stderr
    mpirun(2, command(data, here), check=True)
    assert results(out) == results(here)


def ranks_of(mark: str) -> list[int]:
    """The processes of a run that compute, and their watchdogs; a reaper waits for mpirun."""
    return [
        pid
        for pid, name in processes(mark).items()
        if name != "mdattn-reaper"
        and b"mdattn_mpi\0run" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b"--host" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
