"""Runs put together from lines, what stands out in them, and how they leave for other programs."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.report import timeline
from mdattn_mpi.report.findings import slowest_items, spreads, verdict
from mdattn_mpi.report.runs import Run, read_runs
from mdattn_mpi.report.timeline import timeline_data
from mdattn_mpi.report.trace import trace
from tests.support.synthetic_run import write_run

NAMES = [f"item-{number}" for number in range(7)]


def written(folder: Path, **options: Any) -> list[Run]:
    write_run(folder, NAMES, **{"ranks": 3, **options})
    return read_runs(folder)


def test_a_resumed_job_has_several_runs_in_their_order(tmp_path: Path) -> None:
    written(tmp_path, run=9, closed=False)
    first, second = written(tmp_path, run=4, ranks=2)
    assert [len(run.ranks) for run in (first, second)] == [3, 2]
    assert first.zero < second.zero
    assert (first.closed, second.closed) == (False, True)
    assert "killed" in first.end
    assert [done.item for done in first.done] == [*range(7)]
    assert second.until == pytest.approx(0.1 * 7e6, rel=0.3)


def test_a_rank_that_is_missing_is_seen(tmp_path: Path) -> None:
    """A run is closed if all of its ranks have closed it."""
    assert written(tmp_path)[0].closed
    path = tmp_path / "events-0000.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["rank"] != 2]
    path.write_text("\n".join(lines) + "\n")
    assert not read_runs(tmp_path)[0].closed


@pytest.mark.parametrize("slow", [(0, 2), (2, 5)])
def test_the_slowest_items_and_ranks_are_named(tmp_path: Path, slow: tuple[int, int]) -> None:
    runs = written(tmp_path, slow=slow)
    first = slowest_items(runs, len(NAMES))[0]
    assert (first.rank, first.item, first.stage) == (*slow, "computing")
    assert len({each.item for each in slowest_items(runs, len(NAMES))}) == 7
    by_phase = {(each.thread, each.phase): each for each in spreads(runs[0])}
    assert by_phase["main", "enqueue"].slowest.rank == slow[0]
    assert by_phase["device", "compute"].slowest.rank == slow[0]
    assert by_phase["main", "agree"].slowest.rank != slow[0]
    assert f"rank {slow[0]} on node0 waited least" in verdict(runs[0])


def test_spreads_are_those_of_the_seconds(tmp_path: Path) -> None:
    (run,) = written(tmp_path)
    for each in spreads(run):
        if each.thread != "device":
            spans = [rank.spans[each.thread] for rank in run.ranks]
            number = run.phases.index(each.phase)
            seconds = [s.length[s.phase == number].sum() / 1e6 for s in spans]
            found = (each.least, each.mean, each.most)
            wanted = (min(seconds), np.mean(seconds), max(seconds))
            assert found == pytest.approx(wanted, abs=1e-4)


def unpacked(run: dict[str, Any]) -> list[Any]:
    """The columns as the page's script finds them."""
    raw = zlib.decompress(b64decode(run["columns"]))
    lanes = [rank[thread] for rank in run["ranks"] for thread in ("main", "read", "write")]
    spans, samples = sum(lanes), sum(rank["device"] for rank in run["ranks"])
    found, at = [], 0
    for kind, number in [
        *[("<i4", spans)] * 3, *[("<i4", samples)] * 2, ("<u2", spans), *[("u1", spans)] * 2,
        *[("u1", samples)] * 3,
    ]:  # fmt: skip
        found.append(np.frombuffer(raw, kind, number, at).astype(np.int64))
        at += found[-1].nbytes // 8 * np.dtype(kind).itemsize
    assert at == len(raw)
    return found


def test_the_script_gets_every_span(tmp_path: Path) -> None:
    (run,) = written(tmp_path)
    data = json.loads(timeline_data([run], NAMES.__getitem__))
    (packed,) = data["runs"]
    gap, length, step, *_, number, phase, _, _, _, _ = unpacked(packed)
    assert (number == 1).all()
    item, at = np.cumsum(step), 0
    for rank, about in zip(run.ranks, packed["ranks"], strict=True):
        for thread in ("main", "read", "write"):
            own, spans = slice(at, at + about[thread]), rank.spans[thread]
            ends = np.cumsum(gap[own] + length[own])
            assert ((ends - length[own]) == spans.start).all()
            assert (length[own] == spans.length).all()
            assert (phase[own] == spans.phase).all()
            assert (item[own] == spans.item).all()
            at += about[thread]
    assert data["items"] == {str(n): name for n, name in enumerate(NAMES)}


def test_a_large_job_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = written(tmp_path)
    monkeypatch.setattr(timeline, "MOST", 60)
    (packed,) = json.loads(timeline_data([run], NAMES.__getitem__))["runs"]
    _, length, *_, number, _, fill, _, _, _ = unpacked(packed)
    assert len(length) <= 60
    assert number.sum() == sum(len(s.start) for rank in run.ranks for s in rank.spans.values())
    busy = sum(s.busy.sum() for rank in run.ranks for s in rank.spans.values())
    assert (fill * length).sum() / 255 == pytest.approx(busy, rel=0.02)


def test_a_trace_has_every_span_in_its_place(tmp_path: Path) -> None:
    written(tmp_path, run=1, ranks=2)
    runs = written(tmp_path, run=2, ranks=3)
    made = json.loads("".join(trace(runs, NAMES.__getitem__)))
    events = made["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [*names.values()] == [
        *(f"run 1, rank {rank} on node0" for rank in range(2)),
        *(f"run 2, rank {rank} on node0" for rank in range(3)),
    ]
    took: dict[int, int] = defaultdict(int)
    until: dict[tuple[int, int], int] = defaultdict(int)
    for event in events:
        if event["ph"] == "X":
            thread = event["pid"], event["tid"]
            assert event["ts"] >= until[thread]  # spans that overlap would be drawn as calls
            until[thread] = event["ts"] + event["dur"]
            assert event["args"]["item"] in NAMES
            took[event["pid"]] += event["dur"]
    ranks = [rank for run in runs for rank in run.ranks]
    for pid, rank in enumerate(ranks, 1):
        assert took[pid] == sum(spans.length.sum() for spans in rank.spans.values())
    late = min(e["ts"] for e in events if e["ph"] == "X" and e["pid"] == 3)
    assert late == pytest.approx(1e6 * (runs[1].zero - runs[0].zero), abs=1e4)
    shares = [sum(e["args"].values()) for e in events if e["ph"] == "C"]
    assert max(shares) <= 100
