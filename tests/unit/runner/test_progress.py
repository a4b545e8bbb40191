"""The bar of a job, and its lines where there is no terminal."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator

import pytest

from mdattn_mpi.lockstep.process import Process
from mdattn_mpi.lockstep.terminal import Terminal
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.runner import progress
from mdattn_mpi.runner.progress import Progress, bar

pytest.importorskip("pyte", reason="the emulator of a terminal isn't installed: pip install pyte")

from tests.support.screen import Screen
from tests.support.underway import until

PROBLEM = AttentionProblem(4000, 4000, 2, 1, 16, 16)
FACTS = ["421/1000 items", "3 failed", "ETA 1 h 02 min", "12.3 Mtok/s", "GPU 93%", "455 TFLOP/s"]


@pytest.mark.parametrize("columns", range(20, 140))
def test_a_bar_fits_and_drops_what_matters_least(columns: int) -> None:
    line = bar(421, 1000, FACTS, columns)
    assert len(line) <= columns
    assert line.startswith(" 42%")
    shown = [fact in line for fact in FACTS]
    assert shown[0]
    assert shown == sorted(shown, reverse=True)
    assert all(shown) == (columns >= 5 + len(", ".join(FACTS)))


def test_a_bar_of_80_and_of_40_columns() -> None:
    facts = [*FACTS[:1], *FACTS[2:5]]
    assert bar(421, 1000, facts, 79) == (
        " 42%|████████▍           | 421/1000 items, ETA 1 h 02 min, 12.3 Mtok/s, GPU 93%"
    )
    assert bar(421, 1000, facts, 39) == " 42% 421/1000 items, ETA 1 h 02 min"
    assert bar(421, 1000, FACTS[:1], 39, ascii_only=True).isascii()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.01)
    monkeypatch.setattr(progress, "AFTER_TEXT", 0.0)
    monkeypatch.setattr(Process, "in_foreground", True)  # whoever runs the tests
    screen = Screen(rows=8)
    yield screen
    screen.close()


def terminal_of(screen: Screen) -> Terminal:
    holder = Process.look(os.getpid())
    assert holder
    return Terminal(screen.slave, holder)


def made(screen: Screen, *, total: int = 10, **options: object) -> Progress:
    stream = os.fdopen(os.dup(screen.slave), "w")
    return Progress(
        total, 0, total * PROBLEM.work, shown=True, terminal=terminal_of(screen), stream=stream,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("columns", [80, 40])
def test_text_of_others_stays_whole_above_the_bar(columns: int, screen: Screen) -> None:
    screen.resize(columns, rows=8)
    shown = made(screen, device="GPU", computing=lambda: 0.0)
    said = []
    try:
        for number in range(10):
            if number % 3 == 2:
                shown.skipped(f"mdattn: item {number} is bad, as its tensors are said to be")
                said.append(f"mdattn: item {number} is bad,")
            else:
                shown.finished(PROBLEM)
                os.write(screen.slave, b"rank 3: a warning\nof two lines\n")  # by the launcher
                said += ["rank 3: a warning", "of two lines"]
            until(lambda at=f"{number + 1}0%": screen.lines[-1].strip().startswith(at))
            assert f"{shown.done}/10 items" in screen.lines[-1]
            assert screen.lines[-3:-1] == ["", ""]
            rows = iter(screen.lines)
            assert all(any(row.startswith(text) for row in rows) for text in said[-2:])
        assert f"{shown.failed} failed" in screen.lines[-1]
    finally:
        shown.close()
    assert not any("10 items" in row for row in screen.lines)


def test_a_wish_to_stop_takes_the_bar_away(screen: Screen) -> None:
    stop = threading.Event()
    shown = made(screen, stops=stop.is_set)
    try:
        until(lambda: screen.lines and "0/10 items" in screen.lines[-1])
        stop.set()
        until(lambda: not screen.lines)
        shown.finished(PROBLEM)
        time.sleep(0.1)
        assert screen.lines == []
    finally:
        shown.close()


def test_share_of_the_device_and_time_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = Progress(
        10, 2, 8 * PROBLEM.work, shown=True, device="GPU", stream=stream,
        computing=lambda: 7.0 + 0.75 * (now[0] - 100),  # seven seconds before the first item
    )  # fmt: skip
    assert shown.facts() == ["2/10 items"]
    now[0] += 40
    shown.finished(PROBLEM)
    assert shown.facts() == [
        "3/10 items", "ETA 4 min 40 s", "100 tok/s", "GPU 75%",
        f"{PROBLEM.flops / 40 / 1e6:.3g} MFLOP/s",
    ]  # fmt: skip
    assert stream.getvalue().startswith("mdattn: 3/10 items, ETA 4 min 40 s, 100 tok/s, GPU 75%")
    now[0] += 5
    shown.finished(PROBLEM)
    assert stream.getvalue().count("\n") == 1  # one line in 30 s is enough for a log
