"""The watchdog: a process that a rank can't take with it.

A thread can't watch: it doesn't run while native code holds the GIL, nor when the process is
stopped. So the process that the launcher started forks before MPI, NumPy or a thread exist. The
child becomes the MPI rank; the parent watches it, and reads the board's page that both share. It
acts when the rank dies, when it ends without having left the world, and when it is late. It also
acts when another rank is lost, when another watchdog has vanished, and when the launcher has. It
needs no collective and no answer from anybody to end the job, and it never waits for a file: all
files are the business of a thread, the publisher.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from mdattn_mpi.lockstep import death_note, reaper
from mdattn_mpi.lockstep.blame import (
    INTERRUPTED,
    Heartbeats,
    Lateness,
    first_lost,
    is_clear,
    may_wait_longer,
    verdict_on_exit,
)
from mdattn_mpi.lockstep.board import Board, share
from mdattn_mpi.lockstep.child import DUMP, STOPS, be_the_rank
from mdattn_mpi.lockstep.launcher import launcher
from mdattn_mpi.lockstep.process import WATCHDOG, name_this
from mdattn_mpi.lockstep.publisher import LOOK, POLL, Publisher, within_patience
from mdattn_mpi.lockstep.record import ENDED, PAGE, Page, Record
from mdattn_mpi.lockstep.terminal import terminal
from mdattn_mpi.text import wrapped

_SOON = 0.05  # seconds between two looks when something may be wrong
_LOOK = 0.5  # seconds between two looks, at most; what is urgent wakes the watchdog up
_LOOK_AGAIN = 2.0  # seconds between two looks at whom a late rank waits for
_REPEAT = 0.5  # launchers send one signal several times, to the process and to its group
_NOTE_PATIENCE = 1.0
_ASKED_TO_STOP = "mdattn: asked to stop: what is in hand is finished first; to go on, "


def watch(main: Callable[[], int]) -> int:
    """Run `main` as an MPI rank with a watchdog; return the job's exit code.

    Must be called before MPI, NumPy or a thread exist. `main` runs in a child process and never
    returns here. An error that all ranks agreed on is printed once; any other ends the job.
    """
    board = share(Board(mmap.mmap(-1, PAGE)))
    stacks = os.memfd_create("mdattn-stacks")
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPS, signal.SIGCHLD})
    reaper.post(launcher(), board)
    watchdog = os.getpid()
    child = os.fork()
    if child == 0:
        be_the_rank(main, board, stacks, watchdog)
    return Watchdog(child, board, stacks).run()


class Watchdog:
    """What the parent does until the rank is gone."""

    def __init__(self, child: int, board: Board, stacks: int) -> None:
        self.child = child
        self.board = board
        self.stacks = stacks
        self.launched = launcher()
        self.launcher_pid = os.getppid()
        self.terminal = terminal()
        self.publisher = Publisher(board, child)
        self.lateness = Lateness(time.monotonic())
        self.heartbeats = Heartbeats()
        self._stop_asked = 0.0
        self._waits_until = 0.0
        name_this(WATCHDOG)

    def run(self) -> int:
        """Watch until the rank has ended, or must; return the exit code."""
        self.publisher.start()
        signals = {*STOPS, signal.SIGCHLD}
        while True:
            arrived = signal.sigtimedwait(signals, self._until_next_look())
            second = arrived and arrived.si_signo in STOPS and self._second_stop()
            if second:
                return self._stop_now()
            if arrived and arrived.si_signo in STOPS:  # the launcher may have lost a watchdog: it
                within_patience(self.publisher.look)  # kills the others a second later
            code = self._look()
            if code is not None:
                within_patience(self.publisher.leave)
                return code
            if arrived:  # perhaps a rank is lost, and its watchdog or the launcher says so
                self.publisher.hurry.set()

    def _until_next_look(self) -> float:
        """Seconds. A look costs as much as a tenth of a short step, so there are few of them."""
        left = self.board.page.deadline - time.monotonic()
        return _SOON if self.lateness.suspected else min(_LOOK, max(_SOON, left))

    def _second_stop(self) -> bool:
        """Take note of a signal to stop; True if another one came before it."""
        now = time.monotonic()
        first, self._stop_asked = self._stop_asked, self._stop_asked or now
        self.board.request_stop()
        if not first:
            self._answer_stop()
        return first > 0 and now - first > _REPEAT

    def _answer_stop(self) -> None:
        """Say so at once, at the terminal: Open MPI's mpirun passes on nothing after Ctrl-C."""
        self._erase_bar()
        of_a_job = self.launched.rank == 0 and self.board.record().folder
        # The launcher may stop all because a rank is lost, and then the note has said it.
        if self.terminal and of_a_job and not within_patience(self.publisher.note_exists):
            self.terminal.say(wrapped(_ASKED_TO_STOP + death_note.again()))

    def _stop_now(self) -> int:
        self._kill()
        within_patience(self.publisher.look)  # perhaps the launcher stops all as a rank is lost
        return self._lost_peer() or INTERRUPTED

    def _look(self) -> int | None:
        """Look once at everything that can be wrong; an exit code if something is."""
        pid, status = os.waitpid(self.child, os.WNOHANG)
        if pid:
            return self._ended(os.waitstatus_to_exitcode(status))
        if self.launched.name and os.getppid() != self.launcher_pid:
            return self._end_job(
                f"lost its launcher ({self.launched.name}, pid {self.launcher_pid})"
            )
        if self.publisher.lost:
            self._kill()
            return INTERRUPTED
        return self._lost_peer() or self._late()

    def _ended(self, code: int) -> int:
        verdict = verdict_on_exit(self.board.record(), code)
        if verdict is None:
            within_patience(self.publisher.publish)
            return code
        return self._end_job(verdict.what, code=verdict.exit_code)

    def _late(self) -> int | None:
        """End the job if the rank has passed the deadline of its phase and needn't wait longer."""
        record, now = self.board.record(), time.monotonic()
        stopped = self.publisher.child_state.read() == "T"
        seconds = self.lateness.look(record, now, stopped=stopped)
        if seconds is None:
            return None
        if record.state == ENDED:
            self._kill()
            return record.exit_code
        if not stopped and self._may_wait_longer(record, now):
            return None
        page = Page.from_buffer_copy(self.board.page)
        if not stopped:
            self._ask_for_stacks()
        if self.board.page.state == ENDED:
            return None
        self._kill()
        self.board.restore(page)  # being asked may have woken it up; it was too late
        how = "was stopped (by SIGSTOP?) and " if stopped else ""
        return self._end_job(f"{how}passed its deadline of {seconds:.3g} s", late=True)

    def _may_wait_longer(self, own: Record, now: float) -> bool:
        if now >= self._waits_until:
            within_patience(self.publisher.ask)
            alive = self.heartbeats.alive(within_patience(self.publisher.records) or [], now)
            if not may_wait_longer(own, alive):
                return False
            self._waits_until = now + _LOOK_AGAIN
        return True

    def _lost_peer(self) -> int | None:
        peer = self.publisher.vanished
        if peer is None:
            return None
        self._kill()
        what = "vanished, and its watchdog with it (killed from outside?)"
        self._write_note(peer, what, stack="")
        return INTERRUPTED

    def _end_job(self, what: str, *, code: int = INTERRUPTED, late: bool = False) -> int:
        """This rank is lost: say so everywhere, and let the job end."""
        self._kill()
        self.board.fail(what, late=late)
        within_patience(self.publisher.publish)
        records = self._all_records(late=late)
        own = self.board.record()
        first = first_lost(own, [other for other in records if other.rank != own.rank])
        if first.rank != own.rank and first.fault:
            self._wait_for_note()
        stack = self._stack() if first.rank == own.rank else ""
        waited = f"was waited for by rank {own.rank}, which {own.fault}; it was last seen"
        self._write_note(first, first.fault or waited, stack)
        return code

    def _all_records(self, *, late: bool) -> list[Record]:
        """Where everybody is now. After a death the launcher may be about to kill all: be quick."""
        own, asked = self.board.record(), time.time()
        patience = POLL  # by then all of this node have shown their pages by themselves
        if late and within_patience(self.publisher.has_other_nodes):
            patience += LOOK + POLL
            within_patience(self.publisher.ask)
        end = time.monotonic() + patience
        within_patience(self.publisher.wake_others)
        while own.folder:
            records = within_patience(self.publisher.records) or []
            others = [record for record in records if record.rank != own.rank]
            clear = len(records) == own.size and is_clear(own, others, asked)
            if clear or time.monotonic() > end:
                return records
            time.sleep(0.01)
        return []

    def _write_note(self, culprit: Record, what: str, stack: str) -> None:
        """Write the death note, announce the loss, and say it on stderr if nobody has."""
        note = death_note.compose(
            culprit,
            what,
            within_patience(self.publisher.records) or [],
            stack=stack,
            command=death_note.resume_command(self.launched, max(1, culprit.size)),
        )
        if within_patience(lambda: self.publisher.write_note(note)) is not False:
            text = death_note.message(note)
            within_patience(lambda: print(text, file=sys.stderr, flush=True))

    def _wait_for_note(self) -> None:
        end = time.monotonic() + _NOTE_PATIENCE
        while time.monotonic() < end and not within_patience(self.publisher.note_exists):
            time.sleep(_SOON)

    def _ask_for_stacks(self) -> None:
        """Let the rank's C-level handler write its stacks."""
        with suppress(ProcessLookupError):
            os.kill(self.child, DUMP)
        size = -1
        for _ in range(10):
            time.sleep(_SOON)
            before, size = size, os.fstat(self.stacks).st_size
            if size and size == before:
                return

    def _stack(self) -> str:
        return os.pread(self.stacks, 1 << 16, 0).decode(errors="replace")

    def _kill(self) -> None:
        """Kill the rank; don't wait long for one that the kernel can't kill yet."""
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        self._erase_bar()
        for _ in range(20):
            with suppress(ChildProcessError):
                if os.waitpid(self.child, os.WNOHANG) == (0, 0):
                    time.sleep(0.01)
                    continue
            return

    def _erase_bar(self) -> None:
        """Leave room for text that isn't rank 0's; it draws no more, for it stops or is lost."""
        if self.terminal:
            self.terminal.erase()
