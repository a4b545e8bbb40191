"""The watchdog's thread for files; if a file system hangs, this thread does, and nobody else.

Every watchdog tells its node, in memory, a few times a second. One of them, the node's publisher,
writes for all of the node into the run folder: often at the start, every ten seconds later on, at
once when it is asked to. Only it looks into the run folder, and only if there are other nodes. What
is wrong with a rank its own watchdog writes there itself.
"""

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
from mdattn_mpi.lockstep.node import NodeBoard
from mdattn_mpi.lockstep.process import StateFile, process_state
from mdattn_mpi.lockstep.record import ENDED, Record

POLL = 0.4  # seconds between two looks at the node's board
LOOK = 1.5  # seconds between two looks at the run folder, where there are other nodes
PUBLISH = 10.0  # seconds between two publications, once the job is ten times that old
FETCH = 5.0  # seconds for which somebody who asked is told where the ranks of other nodes are
_HEARTBEAT = 2.0
_PATIENCE = 1.0  # seconds that a watchdog waits for a file

T = TypeVar("T")


class Publisher(threading.Thread):
    """Shows the rank's page to the node, and looks for lost ranks.

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
        self.child_state = StateFile(child)
        self.hurry = threading.Event()
        self.lost = False
        self.vanished: Record | None = None
        self._node: NodeBoard | None = None
        self._opening = threading.Lock()  # the watchdog's own thread comes here too
        self._shown = b""
        self._heartbeat = 0.0
        self._lead: Lead | None = None
        self._stop_noted = False

    def run(self) -> None:
        """Show the page and look around, again and again."""
        while True:
            hurried = self.hurry.wait(POLL)
            self.hurry.clear()
            with suppress(OSError):
                self.show(at_once=hurried)
            with suppress(OSError):
                self.note_stop()
            with suppress(OSError):
                self.look()

    def _node_of(self, record: Record) -> NodeBoard:
        """The board of this node for the folder and the job that the rank has now."""
        with self._opening:
            node = self._node
            if node is None or (node.folder, node.job) != (record.folder, record.job):
                if node is not None:
                    node.close()
                node = self._node = NodeBoard(record)
                self._lead, self._shown = None, b""
            return node

    def note_stop(self) -> None:
        """Say once in the rank's log that it was asked to stop: soon it may be killed."""
        record = self.board.record()
        if record.stop and record.folder and not self._stop_noted:
            self._stop_noted = True
            now = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
            with open(f"{record.folder}/rank-{record.rank:04}.log", "a") as log:
                log.write(f"{now} WARNING asked to stop; the item in hand is finished first\n")

    def show(self, *, at_once: bool = True) -> Record | None:
        """Copy the page to the node's board; or only if it changed or the heartbeat is due."""
        record = self.board.record()
        if not record.folder:
            return None
        node = self._node_of(record)
        state, now = self.child_state.read(), time.monotonic()
        same = bytes(self.board.page) == self._shown and state == record.process_state
        if same and now < self._heartbeat and not at_once:
            return record
        self.board.beat(state)
        self._shown = bytes(self.board.page)
        self._heartbeat = now + _HEARTBEAT
        node.write(record.rank, self._shown)
        return record

    def publish(self) -> None:
        """Show the page, and write it into the run folder: the rank has ended, or is lost."""
        record = self.show()
        if record:
            BoardFile(record.folder).publish({record.rank: self._shown}, record.size)

    def leave(self) -> None:
        """Take the name of the node's board away, if all of the node have met there."""
        own = self.board.record()
        here = [record for record in self.records() if record.shares_pids_with(own)]
        if own.folder and len(here) == (own.local_size or own.size):
            self._node_of(own).hide()

    def look(self) -> None:
        """Look for the notice of a lost rank; publish and look further, if it is up to this one."""
        record = self.board.record()
        if not record.folder:
            return
        node = self._node_of(record)
        if node.leads():
            self._lead = self._lead or Lead(node, record)
            self.vanished = self._lead.vanished_watchdog() or self.vanished
            self._lead.look()
        if node.notice().lost:
            self.lost = True
        if self.lost or self.vanished:
            _wake_the_watchdog()

    def ask(self) -> None:
        """Have the ranks of other nodes among `records` within seconds; those of this node are."""
        record = self.board.record()
        if record.folder:
            self._node_of(record).ask()

    def has_other_nodes(self) -> bool:
        """Whether there are ranks whose pages this node must ask for."""
        own = self.board.record()
        here = [record for record in self.records() if record.shares_pids_with(own)]
        return len(here) < own.size

    def wake_others(self) -> None:
        """Have the watchdogs of this node show their pages now."""
        own = self.board.record()
        if own.folder:
            wake_node(self._node_of(own), own)

    def records(self) -> list[Record]:
        """What this node knows of all ranks of this job."""
        record = self.board.record()
        return self._node_of(record).records() if record.folder else []

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
            self._node_of(record).announce_loss()
        with suppress(OSError):
            BoardFile(record.folder).announce_loss(record.job)
        return is_new


class Lead:
    """What the publisher of a node does for all of it."""

    def __init__(self, node: NodeBoard, own: Record) -> None:
        self.node = node
        self.own = own
        self.file = BoardFile(own.folder)
        self._began = time.monotonic()
        self._next_look = 0.0
        self._next_publication = 0.0
        self._fetch_until = 0.0
        self._asked = (0, 0)  # in this node, and by all nodes
        self._watchdogs: dict[int, int] = {}  # rank: its pid; 0 once it is gone

    def look(self) -> None:
        """Publish if it is time; where there are other nodes, tell them and hear of them."""
        now = time.monotonic()
        if self._find_watchdogs():
            self._next_publication = now
        if len(self._watchdogs) < self.own.size:
            self._talk_to_other_nodes(now)
        if now >= self._next_publication:
            self._publish()
            self._next_publication = now + min(PUBLISH, max(POLL, (now - self._began) / 10))

    def _find_watchdogs(self) -> bool:
        """Look for ranks of this node that are new; True if there are some."""
        before, expected = len(self._watchdogs), self.own.local_size or self.own.size
        if before < expected:
            for record in self._records_here():
                self._watchdogs.setdefault(record.rank, record.watchdog_pid)
            if len(self._watchdogs) == expected:
                self.node.hide()  # all have it open
        return len(self._watchdogs) > before

    def _records_here(self) -> list[Record]:
        return [record for record in self.node.records() if record.shares_pids_with(self.own)]

    def _talk_to_other_nodes(self, now: float) -> None:
        asked_here = self.node.notice().asked
        if asked_here != self._asked[0]:
            if now >= self._fetch_until:
                self.file.ask()
            self._fetch_until = now + FETCH
        elif now < self._next_look and now >= self._fetch_until:
            return
        notice = self.file.notice(self.own.job)
        self._next_look = now + LOOK
        if notice.lost:
            self.node.announce_loss()
        if notice.asked != self._asked[1]:
            wake_node(self.node, self.own)
            self._next_publication = now
        if notice.lost or now < self._fetch_until:
            self._fetch()
        self._asked = asked_here, notice.asked

    def _fetch(self) -> None:
        """Bring the pages of other nodes to this one."""
        for rank, page in enumerate(self.file.pages()):
            record = Record.decode(page)
            if record and record.job == self.own.job and not record.shares_pids_with(self.own):
                self.node.write(rank, page)

    def _publish(self) -> None:
        """Write the pages of this node."""
        pages = self.node.pages()
        here = {record.rank: pages[record.rank] for record in self._records_here()}
        self.file.publish(here, self.own.size)

    def vanished_watchdog(self) -> Record | None:
        """The last record of a rank whose watchdog is gone, and its rank with it."""
        for rank, pid in self._watchdogs.items():
            if pid and rank != self.own.rank and process_state(pid) in ("", "Z", "X"):
                self._watchdogs[rank] = 0
                last = {other.rank: other for other in self._records_here()}[rank]
                # In order, or with a fault that it will write about itself.
                if last.state != ENDED and not last.fault:
                    return last
        return None


def wake_node(node: NodeBoard, own: Record) -> None:
    """Have the other watchdogs of a node look now; any other process ignores this signal."""
    for other in node.records():
        if other.rank != own.rank and other.watchdog_pid and other.shares_pids_with(own):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(other.watchdog_pid, signal.SIGCHLD)


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
