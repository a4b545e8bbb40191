"""The job scripts and ``mdattn submit`` on a real Slurm: finished, cancelled, preempted, killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.mpirun import MARK, ROOT, processes
from tests.support.slurm import Slurm
from tests.support.storm import done, results

JOBS = ROOT / "jobs"
RUN = ("-b", "cpu", "-s", "ring", "--threads", "1")
SLOW = (*RUN, "--chaos", "slow@enqueue")  # half a second an item
SMALL = ("--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=5")
SPREAD = ("--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=5")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(300),
]


def summary(path: Path) -> dict[str, object]:
    """What the job wrote about itself."""
    return dict(json.loads(Path(f"{path}.run/summary.json").read_text()))


def until_some_are_done(cluster: Slurm, job: str, out: Path, some: int = 2) -> None:
    """Wait for the job to be in the middle of its work."""
    cluster.until(f"{some} items of job {job}", lambda: done(out) >= some)


def rest_is_done(cluster: Slurm, data: Path, out: Path, whole: Path, items: int = 12) -> None:
    """Submit again; what was finished is kept, and the bytes are those of `whole`."""
    left = done(out)
    assert 0 < left < items
    job = cluster.submit(JOBS / "one-node.sbatch", *SMALL, arguments=[data, out, *RUN])
    succeeded(cluster, job)
    assert f"resuming: {left} of {items} items done already" in cluster.log(job)
    assert results(out) == results(whole)


def succeeded(cluster: Slurm, job: str) -> None:
    """Wait for `job`, and for it to be a success."""
    end = cluster.wait(job)
    assert end["JobState"] == "COMPLETED", cluster.log(job)


def test_one_node(cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    job = cluster.submit(JOBS / "one-node.sbatch", *SMALL, arguments=[data, out, *RUN])
    succeeded(cluster, job)
    assert results(out) == results(undisturbed)
    assert [rank["device"] for rank in summary(out)["ranks"]]  # type: ignore[attr-defined]
    assert "12 of 12 items done" in cluster.log(job)


def test_many_nodes_share_one_world(
    cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    job = cluster.submit(
        JOBS / "many-nodes.sbatch", *SPREAD, arguments=[data, out, "--group-size", "all", *RUN]
    )
    succeeded(cluster, job)
    assert results(out) == results(undisturbed)
    assert len(json.loads(Path(f"{out}.run/summary.json").read_text())["ranks"]) == 2


def test_groups_on_two_nodes(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out.h5", tmp_path / "alone.h5"
    both = ("--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    job = cluster.submit(
        JOBS / "many-nodes.sbatch", *both, "--time=5",
        arguments=[data, out, "--group-size", "2", *RUN],
    )  # fmt: skip
    succeeded(cluster, job)
    assert "2 groups of 2 ranks" in cluster.log(job)
    second = cluster.submit(JOBS / "one-node.sbatch", *SMALL, arguments=[data, alone, *RUN])
    succeeded(cluster, second)
    assert results(out) == results(alone)


def test_an_array_over_files(cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.h5" for name in ("one", "two", "three of them")]
    for file in files:
        shutil.copy(data, file)
    job = cluster.submit(
        JOBS / "array.sbatch", *SMALL, "--array=1-3", f"--output={tmp_path}/%A_%a.log",
        arguments=[tmp_path / "out", *files],
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    for task in (1, 2, 3):
        succeeded(cluster, f"{job}_{task}")
    for file in files:
        assert results(tmp_path / "out" / file.name).keys() == results(undisturbed).keys()
        assert done(tmp_path / "out" / file.name) == 12


def test_cancelled_in_the_middle_and_submitted_again(
    cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    first = cluster.submit(JOBS / "one-node.sbatch", *SMALL, arguments=[data, out, *SLOW])
    until_some_are_done(cluster, first, out)
    cluster.run("scancel", first)
    assert cluster.wait(first)["JobState"] == "CANCELLED"
    rest_is_done(cluster, data, out, undisturbed)


def test_preempted_requeued_and_resumed(
    cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, urgent = tmp_path / "out.h5", tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    job = cluster.submit(JOBS / "preemptible.sbatch", *SMALL, arguments=[data, out, *SLOW])
    until_some_are_done(cluster, job, out)
    other = cluster.submit(urgent, "--partition=high", "--nodes=2", "--exclusive")
    assert cluster.wait(other)["JobState"] == "COMPLETED"
    succeeded(cluster, job)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert_stopped_and_resumed(cluster.log(job))
    assert results(out) == results(undisturbed)


def assert_stopped_and_resumed(log: str) -> None:
    """Both lives of a requeued job are in its log, and the second did what the first had not."""
    first, second = log.split("mdattn: resuming: ")
    assert "stopped as asked" in first
    left = int(second.split()[0])
    assert 0 < left < 12
    assert f"{left} of 12 items done" in first
    assert f"12 of 12 items done, {12 - left} of them now" in second


def test_a_killed_rank_ends_the_job_with_a_death_note(
    cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    job = cluster.submit(JOBS / "one-node.sbatch", *SMALL, arguments=[data, out, *SLOW])
    until_some_are_done(cluster, job, out)
    os.kill(rank_process(cluster, "1"), signal.SIGKILL)
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "SIGKILL" in cluster.log(job)
    assert "rank 1" in cluster.log(job)
    rest_is_done(cluster, data, out, undisturbed)


def rank_process(cluster: Slurm, rank: str) -> int:
    """The MPI process of a rank, not its watchdog or its starter."""
    found = []
    for pid, name in processes(cluster.env[MARK]).items():
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        step = any(word.startswith(b"SLURM_STEP_ID=") for word in environ)
        program = b"mdattn" in command and not name.startswith("mdattn-")
        if program and step and f"SLURM_PROCID={rank}".encode() in environ:
            found.append(pid)
    (pid,) = found
    return pid


def test_a_time_limit_that_comes_too_early(cluster: Slurm, tmp_path: Path) -> None:
    """Slurm looks at limits every half a minute; so the job must last longer than that."""
    data, out, whole = (tmp_path / name for name in ("data.h5", "out.h5", "whole.h5"))
    cluster.run("mdattn", "make-data", data, "--items", "90", "--length", "50")
    job = cluster.submit(
        JOBS / "preemptible.sbatch", *SMALL, "--time=1", "--signal=USR1@58",
        arguments=[data, out, *SLOW],
    )  # fmt: skip
    second = cluster.submit(JOBS / "one-node.sbatch", *SMALL, arguments=[data, whole, *RUN])
    succeeded(cluster, second)
    cluster.until("the signal", lambda: "stopped as asked" in cluster.log(job), 90.0)
    cluster.until("its place in the queue", lambda: cluster.state(job) == "PENDING")
    assert cluster.job(job)["Restarts"] == "1"
    cluster.run("scancel", job)
    rest_is_done(cluster, data, out, whole, items=90)


def test_a_chain_of_jobs_goes_on_until_one_is_done(
    cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    printed = cluster.run(
        JOBS / "chain.sh", "3", *SMALL, f"--output={tmp_path}/%j.log",
        JOBS / "one-node.sbatch", data, out, *SLOW,
    )  # fmt: skip
    first, second, third = printed.split()
    until_some_are_done(cluster, first, out)
    cluster.run("scancel", "--signal=USR1", first)
    assert cluster.wait(first)["ExitCode"] == "75:0", cluster.log(first)
    succeeded(cluster, second)
    assert cluster.wait(third)["JobState"] == "CANCELLED"
    assert results(out) == results(undisturbed)


def test_submit_prints_what_watches_the_job(
    cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a result.h5"
    printed = cluster.run(
        "mdattn", "submit", data, "-o", out, "--nodes", "2", "--time", "5", "--requeue",
        "--run", *RUN, cwd=tmp_path,
    )  # fmt: skip
    job = printed.split()[2]
    watch = next(line for line in printed.splitlines() if line.startswith("watch:"))
    assert job in cluster.run(*watch.split()[1:])
    succeeded(cluster, job)
    assert results(out) == results(undisturbed)
    assert "12 of 12 items done" in (tmp_path / f"mdattn-a_result-{job}.log").read_text()


def test_submit_with_mpirun_stops_ahead_of_the_limit(
    cluster: Slurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    printed = cluster.run(
        "mdattn", "submit", data, "-o", out, "--nodes", "1", "--ranks-per-node", "2", "--time", "5",
        "--launcher", "mpirun", "--run", *SLOW, cwd=tmp_path,
    )  # fmt: skip
    job = printed.split()[2]
    until_some_are_done(cluster, job, out)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@… would
    assert cluster.wait(job)["ExitCode"] == "75:0", cluster.log(job)
    assert done(out) < 12
    cluster.run("sbatch", f"{out}.sbatch", cwd=tmp_path)
    cluster.until("the rest", lambda: done(out) == 12)
    assert results(out) == results(undisturbed)


def test_a_launcher_that_does_not_match_is_named(
    cluster: Slurm, data: Path, tmp_path: Path
) -> None:
    """Open MPI knows nothing of PMI2: srun makes two worlds of one."""
    job = cluster.submit(
        JOBS / "one-node.sbatch", *SMALL, "--export=ALL,SLURM_MPI_TYPE=none",
        arguments=[data, tmp_path / "out.h5", *RUN],
    )  # fmt: skip
    assert cluster.wait(job)["JobState"] == "FAILED"
    said = " ".join(cluster.log(job).split())  # messages are wrapped
    assert "each is alone in a world of 1" in said
    assert "--mpi=pmix" in said
    assert not (tmp_path / "out.h5").exists()
