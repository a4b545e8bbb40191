"""The death note: who is blamed, what it says, and that it is written once."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mdattn_mpi.lockstep import Board, Launcher, death_note
from mdattn_mpi.lockstep.board import Record


def record(rank: int, **changes: object) -> Record:
    page = Board()
    page.identify(job=1, rank=rank, size=4, device="cpu")
    page.enter("enqueue", "item-2", 5)
    page.progress(2, 9)
    return replace(page.record(), **changes)  # type: ignore[arg-type]


def note(**changes: object) -> death_note.Note:
    culprit = record(1, host="n17", pid=4711)
    others = [record(0, phase="agree"), culprit, record(2, phase="agree"), record(3, item="item-3")]
    made = death_note.compose(
        culprit, "was killed by signal 9 (SIGKILL)", others, stack="in foo()", command="mdattn run"
    )
    return {**made, **changes}


def test_the_message_says_everything_in_short_lines() -> None:
    message = death_note.message(note())
    text = " ".join(message.split())
    for part in (
        "rank 1 of 4", "n17", "4711", "device cpu", "killed by signal 9", "'enqueue'",
        "'item-2'",
        "ranks 0, 2 in agree 'item-2'", "rank 3 in enqueue 'item-3'",
        "at least 2 of 9", "mdattn run",
    ):  # fmt: skip
        assert part in text
    assert max(map(len, message.splitlines())) <= 80
    assert "in foo()" in death_note.page(note())


def test_many_waiting_ranks_are_counted() -> None:
    waited = [{**note()["waited"][0], "rank": rank} for rank in range(0, 600, 2)]
    text = death_note.message(note(waited=waited))
    assert "and 292 more" in text
    assert len(text) < 1000


def test_it_is_written_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda rank: death_note.write(tmp_path, note(rank=rank)), range(8)))
    assert written.count(True) == 1
    winner = written.index(True)
    assert (death_note.read(tmp_path) or {})["rank"] == winner
    assert f"rank {winner} of 4" in (tmp_path / "death-note.txt").read_text()


def test_a_resumed_job_puts_the_old_note_aside(tmp_path: Path) -> None:
    death_note.put_aside(tmp_path, 2)
    for job in (1, 2, 3):
        assert death_note.write(tmp_path, note(job=job))
        death_note.put_aside(tmp_path, job)  # one of this very job stays
        assert death_note.read(tmp_path)
        death_note.put_aside(tmp_path, job + 1)
        assert death_note.read(tmp_path) is None
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"death-note.{n}.{kind}" for n in (1, 2, 3) for kind in ("json", "txt")]
    assert json.loads((tmp_path / "death-note.2.json").read_text())["job"] == 2


def test_half_a_note_is_none(tmp_path: Path) -> None:
    (tmp_path / "death-note.json").write_text('{"job": 1, "wh')
    assert death_note.read(tmp_path) is None
    death_note.put_aside(tmp_path, 1)
    assert not (tmp_path / "death-note.json").exists()


def test_the_command_that_resumes() -> None:
    mpi, alone = Launcher("mpirun", 0, 4), Launcher()
    console = ["/usr/bin/python3", "/opt/x/bin/mdattn", "run", "a b.h5", "--chaos", "kill@read"]
    assert death_note.resume_command(mpi, 4, console) == "mpirun -n 4 mdattn run 'a b.h5'"
    module = ["/usr/bin/python3", "-m", "mdattn_mpi", "run", "x.h5"]
    assert death_note.resume_command(alone, 1, module) == "python -m mdattn_mpi run x.h5"
