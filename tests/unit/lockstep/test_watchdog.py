"""One rank and its watchdog, without a launcher: exit codes, deadlines, signals, excuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.lockstep import Board, death_note
from mdattn_mpi.lockstep.board import pid_namespace
from mdattn_mpi.lockstep.node import NodeBoard
from mdattn_mpi.lockstep.process import StateFile, process_state
from mdattn_mpi.lockstep.publisher import Publisher, within_patience

FRAME = """
import os, signal, sys, threading, time
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.lockstep import board, watch
def main():
    board().identify(device="cpu", local_size=1)
    board().attach({folder!r}, 0, 1)
    board().enter("read", "item-1", 60.0)
    board().started()
{body}
sys.exit(watch(main))
"""


def script(folder: Path, body: str) -> list[str]:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return [sys.executable, "-c", FRAME.format(folder=str(folder), body=lines)]


def run(folder: Path, body: str) -> Any:
    return subprocess.run(
        script(folder, body), check=False, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("code", [0, 1, 3, 75])
def test_the_exit_code_of_a_rank_that_leaves_in_order(tmp_path: Path, code: int) -> None:
    done = run(tmp_path, f"print('hello'); board().end(); return {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "hello\n", "")
    assert death_note.read(tmp_path) is None


def test_an_agreed_error_is_printed_and_is_no_death(tmp_path: Path) -> None:
    body = "error = RejectedError('no', fix='yes'); error.agreed = True; board().end(); raise error"
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (2, "mdattn: error: no. Fix: yes\n")
    assert death_note.read(tmp_path) is None


FAULTS = {
    "os.kill(os.getpid(), 9)": (75, "killed by signal 9 (SIGKILL)"),
    "os.abort()": (75, "killed by signal 6 (SIGABRT)"),
    "os._exit(0)": (75, "exited with code 0 without leaving the job"),
    "os._exit(3)": (75, "exited with code 3 without leaving the job"),
    "sys.exit(0)": (75, "called sys.exit(0)"),
    "raise ValueError('odd')": (4, "raised ValueError: odd"),
    "raise ItemError('bad', item='x')": (1, "raised ItemError: item 'x': bad"),
    "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)": (
        4,
        "raised ZeroDivisionError: division by zero",
    ),
    "board().enter('write', 'item-1', 0.3); time.sleep(60)": (75, "passed its deadline of 0.3 s"),
    "board().enter('write', 'item-1', 0.3); os.kill(os.getpid(), 19)": (75, "was stopped"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_death_is_noted(tmp_path: Path, fault: str) -> None:
    code, what = FAULTS[fault]
    done = run(tmp_path, fault)
    note = death_note.read(tmp_path)
    assert done.returncode == code, done.stderr
    assert note is not None
    assert what in note["what"]
    assert done.stderr == death_note.message(note) + "\n"
    assert (note["rank"], note["phase"]) == (0, "write" if "write" in fault else "read")
    if "sleep" in fault or "raise" in fault:
        assert "<string>" in note["stack"]


def test_a_failure_before_the_world_needs_no_note(tmp_path: Path) -> None:
    body = (
        "from mdattn_mpi.lockstep.record import RUNNING; board().page.state = RUNNING; sys.exit(7)"
    )
    assert run(tmp_path, body).returncode == 7
    assert death_note.read(tmp_path) is None


LOOP = """
print("ready", flush=True)
while not board().stop_requested:
    time.sleep(0.01)
print("stopping", flush=True)
{after}
board().end()
return 75
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("to", ["the launched process", "its whole group"])
def test_a_signal_asks_to_stop(tmp_path: Path, number: int, to: str) -> None:
    with subprocess.Popen(
        script(tmp_path, LOOP.format(after="")), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        (os.killpg if to == "its whole group" else os.kill)(process.pid, number)
        assert process.stdout.readline() == "stopping\n"
        assert process.wait(30) == 75
    assert death_note.read(tmp_path) is None


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        script(tmp_path, LOOP.format(after="time.sleep(1000)")), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        assert process.stdout.readline() == "stopping\n"
        process.terminate()  # the launcher's echo of the first one doesn't count
        time.sleep(1)
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 75


def test_the_rank_dies_with_its_watchdog(tmp_path: Path) -> None:
    body = "print(os.getpid(), flush=True); time.sleep(1000)"
    with subprocess.Popen(script(tmp_path, body), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        rank = int(process.stdout.readline())
        assert process_state(rank) in ("S", "R", "D")
        process.kill()
    end = time.monotonic() + 30
    while process_state(rank) not in ("", "Z") and time.monotonic() < end:
        time.sleep(0.02)
    assert process_state(rank) in ("", "Z")


def test_watching_needs_no_mpi_and_no_numpy() -> None:
    code = (
        "import sys, mdattn_mpi.cli.run, mdattn_mpi.lockstep\n"
        "print([name for name in ('mpi4py', 'numpy', 'h5py') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_files_that_hang_are_not_waited_for() -> None:
    assert within_patience(lambda: time.sleep(5), 0.05) is None
    assert within_patience(lambda: 7, 5) == 7

    def fail() -> None:
        raise OSError

    assert within_patience(fail, 5) is None


def published(request: Any, folder: Path, rank: int, watchdog_pid: int, namespace: int) -> Board:
    """The board of one rank of two, of whose page its node has a copy."""
    board = Board()
    board.attach(folder, rank, 2)
    board.identify(watchdog_pid=watchdog_pid, pid_namespace=namespace)
    board.started()
    node = NodeBoard(board.record())
    node.write(rank, bytes(board.page))
    request.addfinalizer(node.hide)
    return board


@pytest.mark.parametrize("same_container", [True, False])
def test_a_watchdog_that_was_gone_before_it_was_met(
    request: Any, tmp_path: Path, same_container: bool
) -> None:
    """In another container its pid means nothing here; who has vanished there is late one day."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    own = published(request, tmp_path, 0, os.getpid(), pid_namespace())
    published(request, tmp_path, 1, gone.pid, pid_namespace() + (not same_container))
    publisher = Publisher(own, os.getpid())
    publisher.look()
    publisher.look()  # the first one learns who is there
    assert (publisher.vanished is not None) == same_container


def test_the_state_of_a_process_is_asked_of_a_file_that_is_opened_once() -> None:
    asleep = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    state = StateFile(asleep.pid)
    try:
        assert state.read() in ("R", "S", "D")
        asleep.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 60
        while state.read() != "T" and time.monotonic() < end:
            time.sleep(0.01)
        assert state.read() == process_state(asleep.pid) == "T"
    finally:
        asleep.kill()
        asleep.communicate()
    assert state.read() == process_state(asleep.pid) == ""
    assert StateFile(asleep.pid).read() == ""
