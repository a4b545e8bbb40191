"""The bar of a job whose launcher has a terminal: what a person sees there, byte by byte."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from mdattn_mpi.cli import main
from tests.support.mpirun import kill_all, mark_of, start

pytest.importorskip("pyte", reason="the emulator of a terminal isn't installed: pip install pyte")

from tests.support.screen import Screen
from tests.support.underway import until_an_item_is_done

MPICH = Path(sys.prefix) / "mpich"  # where `make test` puts the wheel


class Library(NamedTuple):
    """An MPI, and how to start ranks with it."""

    program: tuple[str, ...] = ()
    env: Mapping[str, str] = {}


LIBRARIES = {
    "Open MPI": Library(),
    "MPICH": Library(
        (str(MPICH / "bin" / "mpirun"),), {"MPI4PY_LIBMPI": str(MPICH / "lib" / "libmpi.so.12")}
    ),
}


class Watched:
    """A job in front of a terminal."""

    def __init__(self, library: Library, screen: Screen, folder: Path) -> None:
        data = folder / "data.h5"
        made = "--items 8 --length 40 --q-heads 2 --kv-heads 1 --head-dim 16"
        assert main(["make-data", str(data), *made.split()]) == 0
        self.screen = screen
        self.process = start(
            2,
            [
                *("-m", "mdattn_mpi", "run", str(data), "-o", str(folder / "out.h5")),
                *("-b", "cpu", "--threads", "1", "--chaos", "slow@enqueue::1"),
            ],
            program=library.program,
            env={"TERM": "xterm", **library.env},
            **screen.popen,
        )

    def until(self, seen: Callable[[list[str]], bool]) -> list[str]:
        """Wait for something to be seen."""
        end = time.monotonic() + 60
        while not seen(lines := self.screen.lines):
            assert time.monotonic() < end, "\n".join(lines)
            time.sleep(0.02)
        return lines

    def end(self) -> tuple[int, list[str]]:
        """The exit code, and what is there at the end."""
        while self.process.poll() is None:
            _ = self.screen.lines  # or it would have to wait for us
            time.sleep(0.02)
        return self.process.returncode, self.screen.lines


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == "MPICH" and not MPICH.exists():
        pytest.skip("there is no MPICH")
    return LIBRARIES[request.param]


@pytest.fixture
def screen(library: Library, request: pytest.FixtureRequest) -> Iterator[Screen]:
    wide = (library is LIBRARIES["Open MPI"]) == (request.function is not test_a_bar_that_goes_away)
    screen = Screen(80 if wide else 40, rows=60)
    yield screen
    screen.close()


def has_bar(lines: list[str]) -> bool:
    return bool(lines) and "% " in lines[-1].replace("|", " ") and "/8 item" in lines[-1]


def test_a_bar_that_goes_away(library: Library, screen: Screen, tmp_path: Path) -> None:
    job = Watched(library, screen, tmp_path)
    try:
        job.until(lambda lines: has_bar(lines) and "ETA" in lines[-1])
        line = b"NCCL: a word of another rank, by the launcher\r\n"
        os.write(screen.slave, line)
        code, lines = job.end()
    finally:
        kill_all(mark_of(job.process))
    text = " ".join(lines)
    assert code == 0, text
    assert "ETA" not in text
    assert "/8 item" not in text
    assert line.strip().decode() in "".join(lines)
    assert "8 of 8 items done" in " ".join(text.split())
    assert text.startswith("mdattn: 8 items of")


def ended_by(act: Callable[[], object], job: Watched) -> str:
    """What is on the screen once `act` has ended a job in its middle, as one line."""
    try:
        job.until(lambda lines: has_bar(lines) and "ETA" in lines[-1])
        act()
        code, lines = job.end()
    finally:
        kill_all(mark_of(job.process))
    text = " ".join(" ".join(lines).split())
    assert code, text
    assert "/8 item" not in text
    return text


def test_ctrl_c(library: Library, screen: Screen, tmp_path: Path) -> None:
    job = Watched(library, screen, tmp_path)
    assert "asked to stop" in ended_by(lambda: screen.type(b"\x03"), job)


def test_a_lost_rank(screen: Screen, library: Library, tmp_path: Path) -> None:
    """What is said of it isn't torn by the bar, nor by a stop that nobody asked for."""
    if library.program:
        pytest.skip("one MPI is enough")
    job = Watched(library, screen, tmp_path)

    def kill_one() -> None:
        os.kill(until_an_item_is_done(tmp_path / "out.h5")[1].pid, signal.SIGKILL)

    text = ended_by(kill_one, job)
    assert "asked to stop" not in text
    assert "(SIGKILL) in phase" in text
    assert "To go on, run the same command again: mpirun -n 2 python -m mdattn_mpi run" in text
