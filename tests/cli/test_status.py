"""``mdattn status`` before, while and after a job runs."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.cli.status import InPlace
from mdattn_mpi.dataset import open_output
from mdattn_mpi.lockstep import Board
from mdattn_mpi.lockstep.board import BoardFile
from mdattn_mpi.lockstep.record import ENDED, PAGE
from mdattn_mpi.problem import AttentionProblem
from tests.support.finished import finished
from tests.support.underway import STANDS, StandingJob, until, until_an_item_is_done

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
    with StandingJob(tmp_path) as job:
        out, stands = job.out, f"item{STANDS}"
        until_an_item_is_done(out)
        capsys.readouterr()
        facts: dict[str, Any] = {}

        def shows_all() -> bool:  # rank 0's page may come later than what it has written
            facts.update(status(out, capsys))
            phases = [(rank["phase"], rank["item"]) for rank in facts["ranks"]]
            return phases[1:] == [("enqueue", stands)] and bool(facts["items_per_second"])

        until(shows_all)
        assert facts["state"] == "running", facts
        assert facts["items"]["todo"] + facts["items"]["done"] == 24
        assert facts["items"]["failed"] == 0
        assert facts["items_per_second"] > 0
        assert facts["seconds_left"] > 0
        assert facts["death_note"] is None
        assert facts["ranks"][0]["host"] == os.uname().nodename
        assert main(["status", str(out)]) == 0
        assert f"rank 1: enqueue '{stands}' for" in capsys.readouterr().out
        job.kill_rank(1)
    facts = status(out, capsys)
    assert facts["state"] == "lost a rank"
    assert (facts["death_note"]["rank"], facts["death_note"]["item"]) == (1, stands)
    assert main(["status", str(out)]) == 0
    assert "killed by signal 9" in capsys.readouterr().out
    assert f"mpirun -n 2 python -m mdattn_mpi run {job.data} -o {out} -b cpu\n" in said(capsys, out)
    job.finish()
    facts = status(out, capsys)
    assert facts["state"] == "finished"
    assert facts["death_note"] is None
    assert [rank["phase"] for rank in facts["ranks"]] == ["left", "left"]


def board_of(out: Path, ranks: int, **facts: Any) -> None:
    """Leave pages of ranks of a job beside `out`, as watchdogs of another host would."""
    folder = Path(f"{out}.run")
    folder.mkdir(exist_ok=True)
    pages = {}
    for rank in range(ranks):
        board = Board()
        board.identify(rank=rank, size=ranks)
        board.page.put(host="elsewhere")
        board.enter("enqueue", "b" if rank == 7 else "a")
        board.beat("R")
        for name, value in facts.items():
            setattr(board.page, name, value)
        pages[rank] = bytes(board.page).ljust(PAGE, b"\0")
    BoardFile(str(folder)).publish(pages, ranks)


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["status", *map(str, arguments)]) == code
    return capsys.readouterr().out


def test_a_job_that_has_no_output_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.h5"
    board_of(out, 2)
    text = said(capsys, out)
    assert text.startswith(f"{out}: starting, 2 ranks\n  rank 0: enqueue 'a' for 0.")
    board_of(out, 2, heartbeat=1.0, stop=True)
    assert said(capsys, out).startswith(f"{out}: interrupted")


def test_many_ranks_fit_on_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.h5"
    board_of(out, 64)
    rows = said(capsys, out).splitlines()[1:]
    assert [row.partition(", for")[0] for row in rows] == [
        "  ranks 0-6, 8-63: enqueue 'a'",
        "  rank 7: enqueue 'b'",
    ]


def test_an_output_that_was_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = finished(tmp_path, {"a": PROBLEM, "b": PROBLEM})
    out, new = files.output, tmp_path / "new.h5"
    board_of(out, 2, state=ENDED, done=2, total=2, first_wall=time.time() - 100)
    assert "ended 0." in (text := said(capsys, out))
    assert "ago, after 1 min 40 s of work" in text
    out.rename(new)
    text = said(capsys, out, code=2)
    assert text.startswith(f"{out}: moved\n  2 of 2 items done, 0 left\n")
    assert "was moved or removed" in text
    assert said(capsys, new).startswith(f"{new}: finished\n")
    board_of(out, 2, done=1, total=2)
    text = said(capsys, out)
    assert text.startswith(f"{out}: running, 2 ranks\n  1 of 2 items done")
    assert "its job goes on writing to it" in " ".join(text.split())


def test_what_is_left_of_a_job_whose_run_folder_is_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = finished(tmp_path, {"a": PROBLEM, "b": PROBLEM})
    with open_output(files.output, writable=True) as output:
        output.ledger.reopen(output.items[0])
    text = said(capsys, files.output)
    assert text.startswith(f"{files.output}: unfinished\n  1 of 2 items done, 1 left\n")
    assert f"there is no {files.output}.run" in text
    board_of(files.output, 2, state=ENDED)
    text = said(capsys, files.output)
    assert text.startswith(f"{files.output}: stopped\n")
    assert text.endswith("  to go on, run the same command again\n")  # which isn't recorded here


def test_why_items_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = finished(tmp_path, dict.fromkeys("abcde", PROBLEM))
    with open_output(files.output, writable=True) as output:
        for item in output.items:
            output.ledger.fail(item, f"item {item.name!r}: query holds NaN")
    rows = said(capsys, files.output).splitlines()
    assert rows[0].endswith(": finished with failures")
    assert rows[2:] == [
        "  failed: item 'a': query holds NaN",
        "  failed: item 'b': query holds NaN",
        "  failed: item 'c': query holds NaN",
        f"  and 2 more: mdattn inspect {files.output}",
    ]


def test_several_outputs_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = finished(tmp_path, {"a": PROBLEM, "b": PROBLEM})
    folder = tmp_path / "results"
    folder.mkdir()
    first, second = folder / "1.h5", folder / "2.h5"
    files.output.rename(first)
    board_of(second, 2, done=1, total=3)
    lines = [
        f"{first}: finished, 2 of 2 items done",
        f"{second}: running, 1 of 3 items done",
        "2 outputs: 1 finished, 1 running; 3 of 5 items done",
    ]
    assert said(capsys, folder).splitlines() == lines
    (folder / "data.h5").write_bytes((tmp_path / "data.h5").read_bytes())
    assert said(capsys, first, second).splitlines() == lines
    assert said(capsys, folder).splitlines() == lines  # without the dataset
    text = said(capsys, first, tmp_path / "none.h5", code=2)
    assert f"{tmp_path / 'none.h5'}: no output\n" in text
    assert said(capsys, f"{second}.run").startswith(f"{second}: running, 2 ranks\n")
    states = [facts["state"] for facts in json.loads(said(capsys, folder, "--json"))]
    assert states == ["finished", "running"]
    empty = tmp_path / "empty"
    empty.mkdir()
    said(capsys, empty, code=2)


def test_watching_until_nothing_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = finished(tmp_path, {"a": PROBLEM})
    out, other = files.output, tmp_path / "other.h5"
    text = said(capsys, out, "--watch")
    assert text == f"{out}: finished, 1 of 1 item done\n"
    board_of(other, 1, total=3)

    def go_on() -> None:
        time.sleep(0.3)
        board_of(other, 1, total=3, done=1)
        time.sleep(0.3)
        board_of(other, 1, total=3, done=3, state=ENDED)

    thread = threading.Thread(target=go_on)
    thread.start()
    text = said(capsys, other, "--watch", "--every", "0.1", code=2)
    thread.join()
    assert text.splitlines() == [
        f"{other}: running, 0 of 3 items done",
        f"{other}: running, 1 of 3 items done",
        f"{other}: moved, 3 of 3 items done",
    ]


def test_watching_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyte", reason="the emulator of a terminal isn't installed")
    from tests.support.screen import Screen

    screen = Screen(40, rows=5)
    monkeypatch.setattr("sys.stdout", os.fdopen(os.dup(screen.slave), "w"))
    place = InPlace()
    for number in range(4):
        place.show([f"{number}: {'x' * 90}", *(f"rank {rank}" for rank in range(number * 3))])
        assert screen.lines == [
            f"{number}: {'x' * 36}", *(f"rank {rank}" for rank in range(min(3, number * 3)))
        ]  # fmt: skip
    screen.close()
