"""``mdattn report`` about a job that lost a rank, and about the one that finished it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.report.runs import read_runs
from tests.support.underway import STANDS, StandingJob, until, until_an_item_is_done


def report(out: Path) -> str:
    assert main(["report", str(out), "--trace", str(out.with_suffix(".json"))]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["traceEvents"]
    return Path(f"{out}.html").read_text()


def test_a_killed_job_and_its_resumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StandingJob(tmp_path) as job:
        out, folder = job.out, Path(f"{job.out}.run")
        until_an_item_is_done(out)
        until(lambda: (runs := read_runs(folder)) and runs[0].done and len(runs[0].ranks) == 2)
        assert "out.h5: running" in report(out)
        job.kill_rank(1)
    text = report(out)
    assert "A rank was lost" in text
    assert "killed by signal 9" in text
    assert "still running, or killed" in text
    (run,) = read_runs(folder)
    lost = len(run.done)
    assert 0 < lost <= STANDS
    assert any(len(rank.spans["main"].start) for rank in run.ranks)

    job.finish()
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
