"""A job says what it waits for, once a phase, and nothing about its items."""

from __future__ import annotations

from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.runner import waits
from mdattn_mpi.runner.jobspec import JobSpec

SPEC = JobSpec("data.h5", "out.h5")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Queue[str]:
    lines: Queue[str] = Queue()
    monkeypatch.setattr(waits, "tell", lines.put)
    monkeypatch.setattr(waits, "LOOK", 0.001)
    return lines


def late(board: Board, phase: str) -> None:
    board.enter(phase)
    board.page.since -= 2 * waits.PATIENCE


def test_every_long_phase_is_named_once(said: Queue[str]) -> None:
    board = Board()
    world: Any = SimpleNamespace(rank=0, board=board)
    with waits.announced_waits(SPEC, world):
        late(board, "enqueue")
        late(board, "run folder")
        assert said.get(timeout=60) == (
            "mdattn: waiting for another job that writes this output to end"
        )
        late(board, "cuDNN")
        assert said.get(timeout=60) == "mdattn: waiting for cuDNN"
    with pytest.raises(Empty):
        said.get_nowait()


@pytest.mark.parametrize(("rank", "quiet"), [(1, False), (0, True)])
def test_others_are_silent(said: Queue[str], rank: int, quiet: bool) -> None:
    board = Board()
    world: Any = SimpleNamespace(rank=rank, board=board)
    late(board, "dataset")
    spec = JobSpec("data.h5", "out.h5", quiet=quiet)
    with waits.announced_waits(spec, world), pytest.raises(Empty):
        said.get(timeout=0.05)
