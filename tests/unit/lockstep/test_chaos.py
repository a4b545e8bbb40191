"""Faults on purpose: which, where, and that they are read as they are written."""

import subprocess
import sys

import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep import Board, Launcher
from mdattn_mpi.lockstep.chaos import arm, parse


@pytest.mark.parametrize(
    ("spec", "rank", "item"),
    [("raise@read", 0, ""), ("raise@read:x", 0, "x"), ("raise@read:x:3", 3, "x"),
     ("raise@read::2", 2, ""), ("raise@read:a:b:1", 1, "a:b"), ("raise@read:#4:1", 1, "#4")],
)  # fmt: skip
def test_specifications(spec: str, rank: int, item: str) -> None:
    found, chaos = parse(spec)
    assert (found, chaos.kind, chaos.phase, chaos.item) == (rank, "raise", "read", item)


@pytest.mark.parametrize(
    "spec",
    ["", "raise", "raise@", "rage@read", "raise@read:x:y", "raise@read:#x", "seed=7"],
)
def test_what_is_no_fault_is_refused(spec: str) -> None:
    with pytest.raises(RejectedError, match="--chaos"):
        parse(spec)


def strikes(spec: str, steps: list[tuple[str, str]], rank: int = 0) -> int | None:
    """Return the step at which the fault happens; it must be ``raise``."""
    page = Board()
    arm(spec, page, Launcher("mpirun", rank, 4))
    for number, (phase, item) in enumerate(steps):
        try:
            page.enter(phase, item)
        except RuntimeError:
            return number
    return None


STEPS = [(phase, f"item-{item}") for item in range(3) for phase in ("read", "agree begin", "write")]


def test_the_fault_strikes_where_it_was_told_to() -> None:
    assert strikes("raise@write", STEPS) == 2
    assert strikes("raise@write:item-1", STEPS) == 5
    assert strikes("raise@write:#2", STEPS) == 8
    assert strikes("raise@agree:item-2", STEPS) == 7
    assert strikes("raise@write:item-1:2", STEPS) is None
    assert strikes("raise@write:item-1:2", STEPS, rank=2) == 5
    assert strikes("raise@nothing", STEPS) is None


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -9), ("segfault", -11), ("exit0", 0), ("exit3", 3), ("raise", 1)],
)
def test_kinds_do_what_they_say(kind: str, code: int) -> None:
    script = f"from mdattn_mpi.lockstep.chaos import KINDS; KINDS[{kind!r}](); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert "alive" not in done.stdout
