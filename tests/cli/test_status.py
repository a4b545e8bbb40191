"""``mdattn status`` before, while and after a job runs."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.problem import AttentionProblem
from tests.support.finished import finished
from tests.support.mpirun import kill_all, mark_of, mpirun, start

PROBLEM = AttentionProblem(40, 40, 2, 1, 16, 16)


def status(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["status", str(out), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_an_output_that_nobody_works_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = finished(tmp_path, {"a": PROBLEM, "b": PROBLEM})
    facts = status(files.output, capsys)
    assert facts["state"] == "finished"
    assert facts["items"] == {"total": 2, "done": 2, "todo": 0, "failed": 0}
    assert facts["ranks"] == []
    assert facts["items_per_second"] is None
    assert main(["status", str(files.output)]) == 0
    assert "2 of 2 items done" in capsys.readouterr().out


def test_no_such_output(tmp_path: Path) -> None:
    assert main(["status", str(tmp_path / "none.h5")]) == 2


def test_a_job_from_its_middle_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.h5", tmp_path / "out.h5"
    assert main(["make-data", str(data), "--items", "8", "--length", "50", "--head-dim", "16"]) == 0
    capsys.readouterr()
    command = ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), "-b", "cpu"]
    process = start(2, [*command, "--chaos", "sleep@enqueue:item5:1"])
    try:
        end = time.monotonic() + 60
        facts: dict[str, Any] = {}
        while not out.exists() and time.monotonic() < end:
            time.sleep(0.05)
        while time.monotonic() < end:
            facts = status(out, capsys)
            phases = [(rank["phase"], rank["item"]) for rank in facts["ranks"]]
            if len(phases) == 2 and phases[1] == ("enqueue", "item5") and facts["items"]["done"]:
                break
            time.sleep(0.1)
        assert facts["state"] == "running", facts
        assert facts["items"]["todo"] + facts["items"]["done"] == 8
        assert facts["items"]["failed"] == 0
        assert facts["items_per_second"] > 0
        assert facts["seconds_left"] > 0
        assert facts["death_note"] is None
        assert facts["ranks"][0]["host"] == os.uname().nodename
        assert main(["status", str(out)]) == 0
        assert "rank 1: enqueue 'item5' for" in capsys.readouterr().out
        os.kill(facts["ranks"][1]["pid"], signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        kill_all(mark_of(process))
    facts = status(out, capsys)
    assert facts["state"] == "lost a rank"
    assert (facts["death_note"]["rank"], facts["death_note"]["item"]) == (1, "item5")
    assert main(["status", str(out)]) == 0
    assert "killed by signal 9" in capsys.readouterr().out
    mpirun(2, command, check=True)
    facts = status(out, capsys)
    assert facts["state"] == "finished"
    assert facts["death_note"] is None
    assert [rank["phase"] for rank in facts["ranks"]] == ["left", "left"]
