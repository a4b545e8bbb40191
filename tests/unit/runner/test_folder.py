"""Times as people read them, and the table of where they went."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mdattn_mpi.runner.folder import (
    LINES_BEFORE,
    TIMES,
    RankLog,
    rank_times,
    time_table,
    write_summary,
)


def test_the_table_names_the_slowest_rank_of_every_phase() -> None:
    ranks = []
    for rank, compute in enumerate((1.0, 5.0, 3.0)):
        seconds = dict.fromkeys(TIMES, 0.25) | {"compute": compute}
        ranks.append({"host": f"node{rank}", "seconds": seconds})
    lines = {line.split()[0]: line for line in time_table(ranks).splitlines()}
    assert set(TIMES) <= set(lines)
    assert "1.0 s" in lines["compute"]
    assert "3.0 s" in lines["compute"]
    assert "5.0 s" in lines["compute"]
    assert "rank 1 on node1" in lines["compute"]
    assert all(len(line) <= 80 for line in lines.values())


def test_a_rank_s_time_is_counted_once() -> None:
    phases = {"read": 1.0, "agree": 2.0, "begin": 0.5, "enqueue": 7.5, "write": 0.1}
    times = rank_times(phases, {"exchange": 1.0, "merge": 0.5})
    assert times["compute"] == 6.5
    assert sum(times.values()) == pytest.approx(sum(phases.values()))


def test_a_summary_is_replaced_whole(tmp_path: Path) -> None:
    for number in range(2):
        path = write_summary(tmp_path, {"number": number})
    assert json.loads(path.read_text()) == {"number": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("mdattn_mpi", level, "", 0, text, (), None)


def test_a_rank_that_has_nothing_to_say_makes_no_log(tmp_path: Path) -> None:
    log = RankLog(tmp_path / "rank-0007.log")
    for number in range(3):
        log.handle(record(logging.INFO, f"item {number} done"))
    assert list(tmp_path.iterdir()) == []
    log.handle(record(logging.WARNING, "asked to stop"))
    log.handle(record(logging.INFO, "item 3 done"))
    log.close()
    lines = (tmp_path / "rank-0007.log").read_text().splitlines()
    assert lines == [
        *(f"item {number} done" for number in range(3)),
        "asked to stop",
        "item 3 done",
    ]


def test_what_came_long_before_is_forgotten(tmp_path: Path) -> None:
    log = RankLog(tmp_path / "rank-0007.log")
    for number in range(2 * LINES_BEFORE):
        log.handle(record(logging.INFO, f"item {number} done"))
    log.handle(record(logging.ERROR, "lost"))
    log.close()
    lines = (tmp_path / "rank-0007.log").read_text().splitlines()
    assert lines[0] == f"item {LINES_BEFORE + 1} done"
    assert lines[-1] == "lost"


def test_a_log_without_a_place_stops_nobody(tmp_path: Path) -> None:
    log = RankLog(tmp_path / "gone" / "rank-0007.log")
    log.handle(record(logging.ERROR, "lost"))
