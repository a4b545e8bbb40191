"""The watchdog's thread for files; if a file system hangs, this thread does, and nobody else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import TypeVar

from mdattn_mpi.lockstep import death_note
from mdattn_mpi.lockstep.board import Board, BoardFile
from mdattn_mpi.lockstep.process import process_state
from mdattn_mpi.lockstep.record import ENDED, Record

POLL = 0.4  # seconds between two looks at the files
_HEARTBEAT = 2.0
_PATIENCE = 1.0  # seconds that a watchdog waits for a file

T = TypeVar("T")


class Publisher(threading.Thread):
    """Publishes the rank's page, and looks for lost ranks in those of the others.

    Methods raise `OSError`, and may hang with the file system: see `within_patience`.

    Attributes
    ----------
    hurry
        Set to have the next look at once.
    lost
        Another watchdog has said that a rank is lost.
    vanished
        The record of a rank of this host whose watchdog is gone without a note.

    """

    def __init__(self, board: Board, child: int) -> None:
        super().__init__(name="mdattn-publisher", daemon=True)
        self.board = board
        self.child = child
        self.hurry = threading.Event()
        self.lost = False
        self.vanished: Record | None = None
        self._published = b""
        self._heartbeat = 0.0
        self._peers: dict[int, int] = {}  # rank: its watchdog's pid
        self._stop_noted = False

    def run(self) -> None:
        """Publish and look around, again and again."""
        while True:
            hurried = self.hurry.wait(POLL)
            self.hurry.clear()
            with suppress(OSError):
                self.publish(at_once=hurried)
            with suppress(OSError):
                self.note_stop()
            with suppress(OSError):
                self.look()

    def note_stop(self) -> None:
        """Say once in the rank's log that it was asked to stop: soon it may be killed."""
        record = self.board.record()
        if record.stop and record.folder and not self._stop_noted:
            self._stop_noted = True
            now = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
            with open(f"{record.folder}/rank-{record.rank:04}.log", "a") as log:
                log.write(f"{now} WARNING asked to stop; the item in hand is finished first\n")

    def publish(self, *, at_once: bool = True) -> None:
        """Copy the page into the run folder; or only if it changed or the heartbeat is due."""
        record = self.board.record()
        if not record.folder:
            return
        state, now = process_state(self.child), time.monotonic()
        same = bytes(self.board.page) == self._published and state == record.process_state
        if same and now < self._heartbeat and not at_once:
            return
        self.board.beat(state)
        self._published = bytes(self.board.page)
        self._heartbeat = now + _HEARTBEAT
        BoardFile(record.folder).publish(self._published, record.rank, record.size)

    def look(self) -> None:
        """Look for the notice of a lost rank, and for watchdogs of this host that have vanished."""
        record = self.board.record()
        if not record.folder:
            return
        if BoardFile(record.folder).is_lost(record.job):
            self.lost = True
            _wake_the_watchdog()
        if len(self._peers) < record.size:
            self._find_peers(record)
        for rank, pid in self._peers.items():
            if pid and process_state(pid) in ("", "Z", "X"):
                self._peers[rank] = 0
                last = {other.rank: other for other in self.records()}.get(rank)
                # In order, or with a fault that it will write about itself.
                if last and last.state != ENDED and not last.fault:
                    self.vanished = last
                    _wake_the_watchdog()

    def _find_peers(self, own: Record) -> None:
        """Remember the watchdogs of all ranks; 0 for those whose pids mean nothing here."""
        for other in self.records():
            here = other.rank != own.rank and other.shares_pids_with(own)
            self._peers.setdefault(other.rank, other.watchdog_pid if here else 0)

    def wake_others(self) -> None:
        """Have the watchdogs of this host publish now; any other process ignores this signal."""
        own = self.board.record()
        for other in self.records():
            if other.rank != own.rank and other.watchdog_pid and other.shares_pids_with(own):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(other.watchdog_pid, signal.SIGCHLD)

    def records(self) -> list[Record]:
        """Read what all ranks of this job have published."""
        record = self.board.record()
        return BoardFile(record.folder).records(record.job) if record.folder else []

    def note_exists(self) -> bool:
        """Whether there is a death note."""
        record = self.board.record()
        return bool(record.folder) and death_note.read(record.folder) is not None

    def write_note(self, note: death_note.Note) -> bool:
        """Write the death note unless there is one, and announce the loss; True if it is new."""
        record = self.board.record()
        if not record.folder:
            return True
        is_new = True
        with suppress(OSError):  # a full disk: stderr gets the note anyway
            is_new = death_note.write(record.folder, note)
        with suppress(OSError):
            BoardFile(record.folder).announce_loss(record.job)
        return is_new


def within_patience(function: Callable[[], T], patience: float = _PATIENCE) -> T | None:
    """Call `function` in a thread; None if it raises `OSError` or isn't back in time."""
    result: list[T] = []

    def call() -> None:
        with suppress(OSError):
            result.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(patience)
    return result[0] if result else None


def _wake_the_watchdog() -> None:
    """Let it look now: it waits for this signal among others."""
    os.kill(os.getpid(), signal.SIGCHLD)
