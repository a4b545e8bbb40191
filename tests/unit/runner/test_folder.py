"""Times as people read them, and the table of where they went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdattn_mpi.runner.folder import TIMES, rank_times, time_table, write_summary
from mdattn_mpi.runner.progress import duration, wrapped


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.0123, "12.3 ms"),
        (4.24, "4.2 s"),
        (185, "3 min 05 s"),
        (42000, "11 h 40 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


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


def test_lines_are_wrapped_between_words_and_tables_stay() -> None:
    path = "/a/very-long/path" * 8
    text = f"mdattn: {'word ' * 40}\n{'name':<30}{'1.0 s':>20}\nmdattn: summary in {path}"
    lines = wrapped(text).splitlines()
    assert all(len(line) <= 80 or line.strip() == path for line in lines)
    assert f"{'name':<30}{'1.0 s':>20}" in lines
    assert lines[-1].strip() == path
