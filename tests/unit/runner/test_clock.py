"""Phases, their seconds, and what the watchdog is told of them."""

from __future__ import annotations

import time

import pytest

from mdattn_mpi.lockstep import Deadlines
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.runner import clock
from mdattn_mpi.runner.clock import PhaseClock
from mdattn_mpi.runner.events import Span


@pytest.fixture(params=["looks at once", "looks at the end"])
def phases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PhaseClock:
    if request.param == "looks at once":
        monkeypatch.setattr(clock, "OFTEN", -1)
    return PhaseClock(Board(), Deadlines(first=1000.0, minimum=1.0, scale=20.0))


def test_seconds_add_up_phase_by_phase(phases: PhaseClock) -> None:
    begin = time.monotonic()
    phases.enter("read", "a", 10)
    time.sleep(0.02)
    phases.enter("enqueue", "a", 10)
    time.sleep(0.05)
    phases.enter("read", "b", 20)
    time.sleep(0.02)
    phases.stop()
    whole = time.monotonic() - begin
    time.sleep(0.05)  # nobody's
    phases.enter("read", "c", 20)
    phases.stop()
    assert set(phases.seconds) == {"read", "enqueue"}
    assert phases.seconds["read"] >= 0.04
    assert phases.seconds["enqueue"] >= 0.05
    assert sum(phases.seconds.values()) == pytest.approx(whole, abs=0.02)


def test_the_board_is_told_phase_item_and_deadline(phases: PhaseClock) -> None:
    phases.enter("read", "a", 10)
    record = phases.board.record()
    assert (record.phase, record.item) == ("read", "a")
    assert record.deadline - record.since == pytest.approx(1000.0)  # never seen before


def test_deadlines_follow_what_a_phase_took(phases: PhaseClock) -> None:
    phases.enter("enqueue", "a", 10)
    time.sleep(0.1)
    phases.stop()
    phases.enter("enqueue", "b", 100)  # ten times the work
    record = phases.board.record()
    assert 20 < record.deadline - record.since < 200


def test_a_phase_lasts_as_long_as_what_others_do_meanwhile(phases: PhaseClock) -> None:
    for phase in ("agree", "enqueue"):
        phases.enter(phase, "a", 10)
        time.sleep(0.1 if phase == "enqueue" else 0)
    phases.stop()
    phases.enter("agree", "b", 10, ("agree", "enqueue"))
    record = phases.board.record()
    assert 2 < record.deadline - record.since < 20


def test_the_deadline_of_a_phase_that_is_in_hand_at_every_look_follows_too() -> None:
    phases = PhaseClock(Board(), Deadlines(first=1000.0, minimum=1.0, scale=20.0))
    for _ in range(3):  # a look comes each time that "enqueue" begins
        phases.enter("read", "a", 10)
        time.sleep(1.1e-9 * clock.OFTEN)
        phases.enter("enqueue", "a", 10)
    record = phases.board.record()
    assert record.phase == "enqueue"
    assert record.deadline - record.since < 1000


def test_every_phase_is_noted_once_it_is_over() -> None:
    spans: list[Span] = []
    phases = PhaseClock(Board(), Deadlines(), spans.append)
    phases.enter("read", "a")
    phases.enter("enqueue", "a")
    phases.enter("agree", "b")
    assert [span[:2] for span in spans] == [("read", "a"), ("enqueue", "a")]
    phases.stop()
    assert spans[2][:2] == ("agree", "b")
    starts, ends = ([span[at] for span in spans] for at in (2, 3))
    assert starts[1:] == ends[:-1]
    assert starts[0] < ends[-1]
    phases.enter("read", "c")
    phases.stop()
    assert len(spans) == 4
    assert spans[3][2] >= ends[-1]
