"""The bar of a job, and its lines where there is no terminal."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator

import pytest

from mdattn_mpi.lockstep.process import Process
from mdattn_mpi.lockstep.terminal import Terminal
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.runner import progress
from mdattn_mpi.runner.progress import Progress, bar
from tests.support.screen import Screen

PROBLEM = AttentionProblem(4000, 4000, 2, 1, 16, 16)
FACTS = ["421/1000 items", "3 failed", "ETA 1 h 02 min", "12.3 Mtok/s", "GPU 93%", "455 TFLOP/s"]


@pytest.mark.parametrize("columns", range(20, 140))
def test_a_bar_fits_and_drops_what_matters_least(columns: int) -> None:
    line = bar(421, 1000, FACTS, columns)
    assert len(line) <= columns
    assert "421/1000 items" in line
    shown = [fact in line for fact in FACTS]
    assert shown == sorted(shown, reverse=True)
    assert all(shown) == (columns >= 5 + len(", ".join(FACTS)))


def test_a_bar_of_80_and_of_40_columns() -> None:
    assert bar(421, 1000, FACTS[:5], 79) == (
        " 42%|██████▎        | 421/1000 items, 3 failed, ETA 1 h 02 min, 12.3 Mtok/s, GPU 93%"
    )[:4] + bar(421, 1000, FACTS[:5], 79)[4:]
    assert bar(421, 1000, FACTS, 39) == " 42% 421/1000 items, 3 failed"
    assert bar(421, 1000, FACTS[:1], 39, ascii_only=True).isascii()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.01)
    monkeypatch.setattr(progress, "AFTER_TEXT", 0.0)
    screen = Screen(rows=8)
    yield screen
    screen.close()


def terminal_of(screen: Screen) -> Terminal:
    me = Process.look(os.getpid())
    assert me
    return Terminal(screen.slave, me._replace(foreground=-1))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
