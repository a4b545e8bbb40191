"""Calls made ready ahead of need: waited for while they are made, made at once before that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.devices.cuda import choice, launches
from mdattn_mpi.devices.cuda.attention import AttentionCall
from mdattn_mpi.devices.cuda.choice import Chooser, needs_no_preparing
from mdattn_mpi.devices.cuda.launches import Launches
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import FULL, LOWER_RIGHT, Band

CALL = AttentionCall(
    6, 10, 4, 2, 16, 8, "bfloat16", "bfloat16", FULL, 0.25, 0.0,
    (64, 16, 1), (32, 16, 1), (16, 8, 1), (32, 8, 1), (4, 1),
)  # fmt: skip
CALLS = [CALL._replace(q_tokens=n) for n in range(1, 7)]


class Engine:
    """Makes a call ready when it is let; says in which thread."""

    name, version, preparing = "cudnn", "double", 0.0

    def __init__(self) -> None:
        self.begun, self.may = threading.Event(), threading.Event()
        self.made: list[tuple[int, bool]] = []
        self.refused = 0

    def refusal(self, call: AttentionCall) -> str:
        return ""

    def prepare(self, call: AttentionCall) -> Any:
        ahead = threading.current_thread() is not threading.main_thread()
        self.made.append((call.q_tokens, ahead))
        if call.q_tokens == self.refused:
            raise RejectedError("no kernel")
        if ahead:
            self.begun.set()
            assert self.may.wait(30)
        return SimpleNamespace(call=call, workspace=0)

    def close(self) -> None:
        self.made.append((0, False))


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def ready(engine: Engine) -> Iterator[Launches]:
    entered = threading.Event()
    made = Launches(Chooser("cudnn", {"cudnn": engine}, (9, 0)), entered.set)
    yield made
    engine.may.set()
    made.close()
    assert engine.made[-1] == (0, False)
    assert entered.is_set() == any(ahead for _, ahead in engine.made)


def test_what_is_being_made_is_waited_for_and_what_is_not_begun_is_made_at_once(
    engine: Engine, ready: Launches
) -> None:
    ready.prepare([*CALLS[:3], CALLS[0]])
    assert engine.begun.wait(30)
    assert ready.get(CALLS[2]).call == CALLS[2]  # type: ignore[attr-defined]
    threading.Timer(0.05, engine.may.set).start()
    assert ready.get(CALLS[0]).call == CALLS[0]  # type: ignore[attr-defined]
    assert ready.get(CALLS[1]).call == CALLS[1]  # type: ignore[attr-defined]
    assert sorted(tokens for tokens, _ in engine.made) == [1, 2, 3]
    assert (1, True) in engine.made
    assert (3, False) in engine.made


def test_a_call_is_made_once_for_everything_that_it_depends_on(
    engine: Engine, ready: Launches
) -> None:
    first = ready.get(CALL)
    assert ready.get(AttentionCall(*CALL)) is first
    for change in (
        {"kv_tokens": 11}, {"band": LOWER_RIGHT}, {"band": Band(4, None)}, {"softcap": 30.0},
        {"dtype": "float16"}, {"scale": 0.5}, {"k": (64, 16, 1)}, {"lse": (1, 6)},
        {"out_dtype": "float32"},
    ):  # fmt: skip
        assert ready.get(CALL._replace(**change)) is not first  # type: ignore[arg-type]
    ready.prepare([CALL])
    assert len(engine.made) == 10


def test_the_oldest_call_makes_room(
    engine: Engine, ready: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "MOST", 2)
    kept = ready.get(CALLS[0])
    for call in (CALLS[1], CALLS[0], CALLS[2]):
        ready.get(call)
    assert ready.get(CALLS[0]) is kept
    ready.get(CALLS[1])
    assert [tokens for tokens, _ in engine.made] == [1, 2, 3, 2]


def test_what_fails_ahead_of_need_fails_when_it_is_wanted(engine: Engine, ready: Launches) -> None:
    engine.refused = 1
    ready.prepare(CALLS[:2])
    assert engine.begun.wait(30)
    with pytest.raises(RejectedError, match="no kernel"):
        ready.get(CALLS[0])


@pytest.mark.parametrize(
    ("kernel", "sm", "why", "needless"),
    [
        ("auto", (9, 0), "", True),
        ("flash", (9, 0), "", True),
        ("cudnn", (9, 0), "", False),
        ("auto", (8, 0), "", False),
        ("auto", (9, 0), "not installed", False),
    ],
)
def test_who_needs_no_preparing(
    kernel: str,
    sm: tuple[int, int],
    why: str,
    needless: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "gpu_count", lambda: 1)
    monkeypatch.setattr(choice, "gpu_sm", lambda ordinal: sm)
    monkeypatch.setattr(choice, "why_not", lambda found: why)
    assert needs_no_preparing(kernel) is needless
