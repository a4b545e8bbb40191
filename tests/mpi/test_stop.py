"""The real job is asked to stop: it commits the item in hand, exits with 75, and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.lockstep import death_note
from tests.support.mpirun import kill_all, mark_of, mpirun, start
from tests.support.storm import check, finish, results
from tests.support.underway import STANDS, until, until_an_item_is_done


class Job:
    """A job that takes half a second an item, and what it gives when nobody disturbs it."""

    def __init__(self, folder: Path, items: int = 6) -> None:
        self.data, self.out, self.items = folder / "data.h5", folder / "out.h5", items
        options = f"--items {items} --lengths 40:90 --q-heads 2 --head-dim 16 --seed 5"
        assert main(["make-data", str(self.data), *options.split()]) == 0
        whole = folder / "whole.h5"
        mpirun(2, self.command(whole), check=True)
        self.expected = results(whole)

    def command(self, out: Path, *options: str) -> list[str]:
        fixed = ["-b", "cpu", "-s", "ring", "--lse", "--threads", "1"]
        return ["-m", "mdattn_mpi", "run", str(self.data), "-o", str(out), *fixed, *options]

    def slowly(self, *options: str) -> list[str]:
        return self.command(self.out, "--chaos", "slow@enqueue::1", *options)

    def is_resumed(self) -> None:
        """What was stopped is intact, and goes on to the same end."""
        done = check(self.out, self.expected, "stopped")
        assert 0 < done < self.items
        assert death_note.read(f"{self.out}.run") is None
        mpirun(2, self.command(self.out), check=True)
        assert results(self.out) == self.expected


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def long_job(tmp_path: Path) -> Job:
    return Job(tmp_path, STANDS + 2)


def test_a_second_job_keeps_its_hands_off(long_job: Job) -> None:
    process = start(2, long_job.command(long_job.out, "--chaos", f"sleep@enqueue:#{STANDS}:1"))
    try:
        until_an_item_is_done(long_job.out)
        second = mpirun(2, long_job.command(long_job.out, "--overwrite"))
    finally:
        kill_all(mark_of(process))
    assert second.returncode == 2
    assert "another job is writing this output: pid" in " ".join(second.stderr.split())
    long_job.is_resumed()  # the lock went with its owner


@pytest.mark.parametrize("to", ["mpirun", "one rank", "one watchdog"])
def test_a_signal(job: Job, to: str) -> None:
    process = start(2, job.slowly(), stdout=subprocess.DEVNULL)
    try:
        record = until_an_item_is_done(job.out)[1]
        pids = {"mpirun": process.pid, "one rank": record.pid, "one watchdog": record.watchdog_pid}
        os.kill(pids[to], signal.SIGUSR1)
        code, said = finish(process)
    finally:
        kill_all(mark_of(process))
    assert code == 75, said
    job.is_resumed()


# MPICH's mpirun may crash by itself when it is told twice, on a busy machine, and gives 0 then.
HYDRA_CRASHES = "HYD_pmcd_pmip_control_cmd_cb"
MPICH = Path(sys.prefix) / "mpich"  # where `make test` puts the wheel


@pytest.mark.parametrize(
    ("library", "number"),
    [("Open MPI", signal.SIGINT), ("Open MPI", signal.SIGTERM), ("MPICH", signal.SIGINT)],
)
def test_a_launcher_that_kills_what_it_interrupts(
    long_job: Job, library: str, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that can't stop in time: its log and `status` say what happened, nothing is lost."""
    program, env = (), {}
    if library == "MPICH":
        if not MPICH.exists():
            pytest.skip("there is no MPICH")
        program = (str(MPICH / "bin" / "mpirun"),)
        env = {"MPI4PY_LIBMPI": str(MPICH / "lib" / "libmpi.so.12")}
    command = long_job.command(long_job.out, "--chaos", f"sleep@enqueue:#{STANDS}:1")
    process = start(2, command, stdout=subprocess.DEVNULL, program=program, env=env)
    try:
        until_an_item_is_done(long_job.out)
        assert state(long_job, capsys) == "running"
        process.send_signal(number)
        end = time.monotonic() + 3
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            now = state(long_job, capsys)
            assert now in ("running", "stopping", "interrupted", "lost a rank"), now
        if process.poll() is None:  # MPICH's waits for its ranks, till it is told twice
            until(lambda: state(long_job, capsys) == "stopping", 20)
            process.send_signal(number)
        code, said = finish(process)
    finally:
        kill_all(mark_of(process))
    assert code != 0 or HYDRA_CRASHES in said, said
    assert state(long_job, capsys) in ("interrupted", "lost a rank")
    for rank in range(2):
        assert "asked to stop" in Path(f"{long_job.out}.run/rank-{rank:04}.log").read_text()
    mpirun(2, long_job.command(long_job.out), check=True)
    assert results(long_job.out) == long_job.expected


def state(job: Job, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["status", str(job.out), "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)["state"])


def test_the_time_is_over(job: Job) -> None:
    """The limit is taken from Slurm's variable; the job stops ahead of it."""
    soon = {"SLURM_JOB_END_TIME": str(int(time.time()) + 1_000_000)}
    assert mpirun(2, [*job.slowly(), "--max-time", "0.001s"], env=soon).returncode == 75
    end = int(time.time()) + 8
    done = mpirun(2, job.slowly(), env={"SLURM_JOB_END_TIME": str(end)})
    if done.returncode == 0:
        pytest.skip("the machine did all items before the limit came near")
    assert done.returncode == 75, done.stderr
    if not check(job.out, job.expected, "stopped"):
        pytest.skip("the machine did no item before the limit came near")
    job.is_resumed()
