"""Finding the terminal behind a launcher, and what is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdattn_mpi.lockstep.process import Process
from mdattn_mpi.lockstep.terminal import Terminal

pytest.importorskip("pyte", reason="the emulator of a terminal isn't installed: pip install pyte")

from tests.support.mpirun import ROOT
from tests.support.screen import Screen

RANK = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
ASK = "from mdattn_mpi.lockstep import terminal; t = terminal(); print(t and t.holder.name)"


@pytest.fixture
def screen() -> Iterator[Screen]:
    screen = Screen()
    yield screen
    screen.close()


def found(screen: Screen, tmp_path: Path, *, how: str, **variables: str) -> str:
    """What a rank finds that `how`, a shell command, starts below something called prterun."""
    launcher = tmp_path / "prterun"
    launcher.write_text(f"#!/bin/bash\n{how}\n")  # a script is called what its file is called
    launcher.chmod(0o755)
    variables = {"TERM": "xterm", "ASK": ASK, "PYTHON": sys.executable, **variables}
    environment = {**os.environ, **RANK, "PYTHONPATH": str(ROOT), **variables}
    answer = tmp_path / "answer"
    command = [str(launcher), str(answer)]
    subprocess.run(command, env=environment, timeout=60, check=True, stderr=screen.slave)
    return answer.read_text().strip()


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ('"$PYTHON" -c "$ASK" 2> >(cat) >$1; true', "prterun"),
        ('bash -c \'"$PYTHON" -c "$ASK"; true\' 2> >(cat) >$1; true', "prterun"),  # a wrapper
        ('"$PYTHON" -c "$ASK" >$1; true', "python"),  # its own
        ('"$PYTHON" -c "$ASK" 2>$1.log >$1; true', "None"),  # sent elsewhere on purpose
        ('"$PYTHON" -c "$ASK" 2>/dev/null >$1; true', "None"),
        ('exec 2> >(cat); "$PYTHON" -c "$ASK" >$1; true', "None"),  # mpirun … 2>&1 | tee
    ],
)
def test_the_launchers(screen: Screen, tmp_path: Path, how: str, name: str) -> None:
    assert found(screen, tmp_path, how=how).rstrip("0123456789.") == name


def test_one_that_moves_no_cursor(screen: Screen, tmp_path: Path) -> None:
    how = '"$PYTHON" -c "$ASK" 2> >(cat) >$1; true'
    assert found(screen, tmp_path, how=how, TERM="dumb") == "None"
    assert found(screen, tmp_path, how=how, OMPI_COMM_WORLD_SIZE="") == "None"  # no rank


def test_nothing_is_written_from_the_background_or_after_the_end(screen: Screen) -> None:
    me = Process.look(os.getpid())
    assert me
    for holder in (
        me._replace(start=me.start - 1),  # it is gone, and another has its pid
        me._replace(pid=2**22 + 1),
    ):
        Terminal(screen.slave, holder).draw("bar")
        assert screen.lines == []
    assert not me._replace(group=7, foreground=8).in_foreground
    assert me._replace(group=7, foreground=7).in_foreground
    Terminal(screen.slave, me._replace()).draw("bar")
    assert me.in_foreground == (screen.lines[-1:] == ["bar"])


def test_a_terminal_that_was_stopped_is_not_waited_for() -> None:
    """As by Ctrl-S: what finds no room is dropped."""
    master, slave = os.openpty()
    me = Process.look(os.getpid())
    assert me
    fd = os.open(os.ttyname(slave), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    terminal = Terminal(fd, me._replace())
    for _ in range(5000):
        terminal.draw("x" * 79)
    for each in (fd, slave, master):
        os.close(each)
