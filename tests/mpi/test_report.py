"""``mdattn report`` about a job that lost a rank, and about the one that finished it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.lockstep.board import BoardFile
from mdattn_mpi.report.runs import read_runs
from mdattn_mpi.runner.loop import MOST_BEHIND
from tests.support.mpirun import kill_all, mark_of, mpirun, start

# More items are never under way to the disk: by then one is done, however slow the disk is.
SLEEPS = MOST_BEHIND + 4


def report(out: Path) -> str:
    assert main(["report", str(out), "--trace", str(out.with_suffix(".json"))]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["traceEvents"]
    return Path(f"{out}.html").read_text()


def test_a_killed_job_and_its_resumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.h5", tmp_path / "out.h5"
    shape = ["--length", "50", "--head-dim", "16"]
    assert main(["make-data", str(data), "--items", "24", *shape]) == 0
    command = ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), "-b", "cpu"]
    process = start(2, [*command, "--chaos", f"sleep@enqueue:item{SLEEPS}:1"])
    try:
        end, folder = time.monotonic() + 60, Path(f"{out}.run")
        while time.monotonic() < end:
            runs = read_runs(folder) if folder.exists() else []
            if runs and runs[0].done and len(runs[0].ranks) == 2:
                break
            time.sleep(0.05)
        assert "out.h5: running" in report(out)
        os.kill(BoardFile(folder).records()[1].pid, signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        kill_all(mark_of(process))
    text = report(out)
    assert "A rank was lost" in text
    assert "killed by signal 9" in text
    assert "still running, or killed" in text
    (run,) = read_runs(folder)
    lost = len(run.done)
    assert 0 < lost <= SLEEPS
    assert any(len(rank.spans["main"].start) for rank in run.ranks)

    mpirun(2, command, check=True)
    first, second = read_runs(folder)
    assert len(first.done) == lost
    assert sorted({done.item for run in (first, second) for done in run.done}) == [*range(24)]
    assert second.closed
    for rank in second.ranks:
        main_thread = sum(rank.seconds["main"].values())
        assert 0 < main_thread <= rank.until / 1e6 * 1.001
        assert {"enqueue", "agree"} <= rank.seconds["main"].keys()
        assert rank.seconds["read"].keys() == {"read"}
        assert rank.seconds["write"].keys() >= {"collect", "write", "sync"}
        assert 0 < rank.device_seconds()["compute"] <= rank.seconds["main"]["enqueue"]
    text = report(out)
    assert "Where the time went in run 1" in text
    assert "out.h5: finished" in text
    assert "A rank was lost" not in text
    assert f"{out}.html: " in capsys.readouterr().out
