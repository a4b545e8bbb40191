"""What ranks keep of what they did: whole, bounded, and never in the way."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.errors import LOGGER
from mdattn_mpi.runner import events as module
from mdattn_mpi.runner.events import Events, Spans, read_lines, remove_events


def opened(folder: Path, rank: int = 0, **options: Any) -> Events:
    events = Events(folder / "events-0000.jsonl", rows={"a": 0, "b": 1}, **options)
    events.start(5, rank, host="here")
    return events


def unwatched(folder: Path, rank: int = 0, size: int = 1) -> Events:
    """Events without a thread that takes them: the test does."""
    events = Events(folder / "events-0000.jsonl", size, {"a": 0})
    events._who = {"run": 5, "rank": rank}
    return events


def test_what_is_said_is_read_again(tmp_path: Path) -> None:
    events = opened(tmp_path)
    zero = events.zero
    events.main += [
        ("enqueue", "a", zero + 1_000_000, zero + 3_000_000),
        ("agree", "b", zero + 3_000_000, zero + 3_007_000),
        ("agree", "", zero + 3_007_000, zero + 4_000_000),
    ]
    events.write.append(("sync", "b", zero + 5_000_000, zero + 6_000_000))
    events.device_starts_at({"compute": 10.0})
    events.device_is_at({"compute": 10.25, "exchange": 0.5})
    events.done("b")
    events.failed("a", "no room")
    events.close(stopped=True)
    who, what = read_lines(tmp_path)
    assert (who["run"], who["rank"], who["host"]) == (5, 0, "here")
    assert who["zero"] == pytest.approx(time.time(), abs=60)
    assert what["main"] == {
        "phases": ["enqueue", "agree"],
        "seconds": [0.002, 0.001],
        "phase": [0, 1, 1],
        "item": [0, 1, -1],
        "start": [1000, 3000, 3007],
        "length": [2000, 7, 993],
    }
    assert what["write"]["item"] == [1]
    assert "read" not in what
    assert what["device"][0][2:] == [250_000, 500_000, 0]
    assert what["done"][0][0] == 1
    assert what["failed"][0][::2] == [0, "no room"]
    assert what["stopped"]
    assert what["ended"] >= 0


def test_it_is_written_while_the_job_runs(tmp_path: Path) -> None:
    """A killed job leaves it behind."""
    events = opened(tmp_path)
    events.main.append(("enqueue", "a", events.zero, events.zero + 1000))
    end = time.monotonic() + 30
    while len([*read_lines(tmp_path)]) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert [*read_lines(tmp_path)][1]["main"]["length"] == [1]
    assert not events.main
    events.close()


spans = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-1, 5), st.integers(0, 50), st.integers(0, 400)),
    min_size=1,
    max_size=60,
)


@given(spans, st.integers(0, 500))
def test_what_is_short_is_put_together_and_nothing_is_lost(
    rows: list[tuple[int, int, int, int]], grain: int
) -> None:
    phase, item, gap, length = map(np.array, zip(*rows, strict=True))
    start = np.cumsum(gap) + np.append(0, np.cumsum(length))[:-1]
    whole = Spans(phase, item, start, length, np.ones(len(rows), int), length)
    less = whole.put_together(grain)
    assert less.number.sum() == len(rows)
    assert less.busy.sum() == length.sum()
    assert (less.start[1:] >= (less.start + less.length)[:-1]).all()
    for first, number, *about in zip(
        np.cumsum(less.number) - less.number,
        less.number,
        less.phase,
        less.item,
        less.start,
        less.length,
        strict=True,
    ):
        part = rows[first : first + number]
        assert about[1] == part[0][1]
        assert about[2] == start[first]
        assert about[3] == start[first + number - 1] + part[-1][3] - start[first]
        took = [sum(row[3] for row in part if row[0] == each) for each in range(4)]
        assert took[about[0]] == max(took)
        if number > 1:
            assert all(row[3] < grain for row in part)
            assert start[first + number - 1] // grain == start[first] // grain
    again = less.put_together(4 * grain)
    assert again.busy.sum() == length.sum()
    assert again.number.sum() == len(rows)


def test_the_file_is_bounded_however_many_items_there_are(tmp_path: Path) -> None:
    items, millisecond = 100_000, 1_000_000
    events = unwatched(tmp_path, size=1000)
    for part in range(0, items, 1000):
        for number in range(part, part + 1000):
            at = events.zero + number * millisecond
            events.main += [
                ("enqueue", "a", at, at + 900_000),
                ("agree", "a", at + 900_000, at + millisecond),
            ]
        events._append(events._taken())
    lines = [line["main"] for line in read_lines(tmp_path) if "main" in line]
    assert sum(len(line["start"]) for line in lines) < 16_000
    assert sum(sum(line["busy"] if "busy" in line else line["length"]) for line in lines) == (
        items * 1000
    )
    seconds = dict.fromkeys(("enqueue", "agree"), 0.0)
    for line in lines:
        for phase, took in zip(line["phases"], line["seconds"], strict=True):
            seconds[phase] += took
    assert seconds == pytest.approx({"enqueue": 90.0, "agree": 10.0})
    assert (tmp_path / "events-0000.jsonl").stat().st_size < 1 << 20


def test_ranks_of_a_node_share_a_file(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        events = unwatched(tmp_path, rank)
        for _ in range(20):
            events.main += [("enqueue", "a", events.zero, events.zero + 1000)] * 300
            events._append(events._taken())

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(4):
        mine = [line for line in read_lines(tmp_path) if line["rank"] == rank]
        assert sum(len(line["main"]["start"]) for line in mine if "main" in line) == 6_000
    assert len((tmp_path / "events-0000.jsonl").read_bytes().splitlines()) == 4 * 20


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events-0000.jsonl"
    whole = json.dumps({"run": 1, "rank": 0}).encode()
    path.write_bytes(
        b'{"run":1,"rank":0,"ma' + b"\n" + whole + b"\n\xff\xfe\n[1]\n{}\n" + whole[:9]
    )
    assert [*read_lines(tmp_path)] == [{"run": 1, "rank": 0}]


def test_a_job_that_starts_over_forgets(tmp_path: Path) -> None:
    opened(tmp_path).close()
    assert [*read_lines(tmp_path)]
    remove_events(tmp_path)
    assert not [*read_lines(tmp_path)]


@pytest.mark.parametrize("fault", ["no room", "half a line"])
def test_a_full_disk_ends_the_keeping_not_the_job(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events = opened(tmp_path)
    real = os.write

    def write(file: int, raw: bytes) -> int:
        if fault == "no room":
            raise OSError(28, "No space left on device")
        return real(file, raw[: len(raw) // 2])

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(LOGGER, "propagate", True)
    events.main.append(("enqueue", "a", events.zero, events.zero + 1000))
    with caplog.at_level(logging.WARNING, LOGGER.name):
        events._append(events._taken())
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    events.main.append(("enqueue", "a", events.zero, events.zero + 1000))
    events.close()
    assert len([*read_lines(tmp_path)]) == 1


def test_a_file_system_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = opened(tmp_path)
    hangs, back = threading.Event(), threading.Event()

    def write(file: int, raw: bytes) -> int:
        hangs.set()
        assert back.wait(60)
        return len(raw)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    events.main.append(("enqueue", "a", events.zero, events.zero + 1000))
    assert hangs.wait(60)
    events.close()  # returns, though the file system doesn't
    back.set()


def test_without_a_file_nothing_is_kept_and_nothing_piles_up() -> None:
    events = Events()
    events.start(1, 0)
    events.main.append(("enqueue", "a", events.zero, events.zero + 1000))
    end = time.monotonic() + 30
    while events.main and time.monotonic() < end:
        time.sleep(0.01)
    assert not events.main
    events.close()
