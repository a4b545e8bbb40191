"""The watchdog: a process that a rank can't take with it.

A thread can't watch: it doesn't run while native code holds the GIL, nor when the process is
stopped. So the process that the launcher started forks before MPI, NumPy or a thread exist. The
child becomes the MPI rank; the parent watches it, and reads the board's page that both share. It
acts when the rank dies, when it ends without having left the world, and when it is late. It also
acts when another rank is lost, when another watchdog has vanished, and when the launcher has. It
needs no collective and no answer from anybody to end the job, and it never waits for a file: all
files are a second thread's business.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from mdattn_mpi.errors import MdattnError
from mdattn_mpi.lockstep import death_note, guard
from mdattn_mpi.lockstep.board import ENDED, PAGE, RUNNING, Board, BoardFile, Record, share
from mdattn_mpi.lockstep.launcher import launcher
from mdattn_mpi.lockstep.process import name_this, process_state, set_death_signal

INTERRUPTED = 75
BY_MPI = "got an error from MPI"  # mostly because the rank at the other end has died
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_DUMP = signal.SIGRTMIN + 9  # asks the rank for its stacks
_POLL = 0.05
_LOOK = 0.5  # seconds between two looks, at most; what is urgent wakes the watchdog up
_SCRIBE_POLL = 0.4
_HEARTBEAT = 2.0
_STOPPED = 60.0  # seconds that a rank alone may be stopped, wherever it is
_SUSPENDED = 2.0  # between two looks, after which this process must have been stopped
_LOOK_AGAIN = 2.0  # seconds between two looks at who excuses a late rank
_DEAF = 10.0  # seconds without a heartbeat after which nobody is home
_BLIND = 1.5  # seconds more for a rank that waits for others whose records it can't read
_REPEAT = 0.5  # launchers send one signal several times, to the process and to its group
_NOTE_PATIENCE = 1.0

T = TypeVar("T")

# Phases in which a rank may be waiting for another one without having said so.
_SHARED_PHASES = frozenset(
    {"start", "begin", "enqueue", "collect", "agree", "take", "groups", "end"}
)


def watch(main: Callable[[], int]) -> int:
    """Run `main` as an MPI rank with a watchdog; return the job's exit code.

    Must be called before MPI, NumPy or a thread exist. `main` runs in a child process and never
    returns here. An error that all ranks agreed on is printed once; any other ends the job.
    """
    page = memoryview(mmap.mmap(-1, PAGE))
    board = share(Board(page))
    stacks = os.memfd_create("mdattn-stacks")
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPS, signal.SIGCHLD})
    guard.post(launcher(), board)
    watchdog = os.getpid()
    child = os.fork()
    if child == 0:
        _be_the_rank(main, board, stacks, watchdog)
    return Watchdog(child, board, stacks).run()


# -- the child ------------------------------------------------------------------------------------


def _be_the_rank(main: Callable[[], int], board: Board, stacks: int, watchdog: int) -> None:
    """Run `main` and exit with its code; never return."""
    code = 4
    try:
        _die_with(watchdog)
        board.watchdog_pid = watchdog
        board.identify()
        faulthandler.enable(stacks)
        faulthandler.register(_DUMP, stacks)
        threading.excepthook = lambda thread: _fail(board, stacks, thread.exc_value)
        for number in STOPS:
            signal.signal(number, lambda *_: board.request_stop())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOPS, signal.SIGCHLD})
        code = _run(main, board, stacks)
    except BaseException as error:
        code = _note_failure(board, stacks, error)
    finally:
        _exit(board, code)


def _run(main: Callable[[], int], board: Board, stacks: int) -> int:
    """Call `main` and leave the world with the others, if they are leaving too."""
    try:
        code = main()
    except MdattnError as error:
        if not error.agreed and board.record().state != RUNNING:
            raise
        if not error.agreed or launcher().rank == 0:
            print(f"mdattn: error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except SystemExit as stop:
        if board.record().state != RUNNING or not stop.code:
            raise
        code = stop.code if isinstance(stop.code, int) else 1
    if board.record().state == RUNNING:
        board.end()
    elif board.record().state != ENDED:
        from mdattn_mpi.lockstep.world import leave

        leave(board)
    return code


def _note_failure(board: Board, stacks: int, error: BaseException | None) -> int:
    """Leave for the watchdog what went wrong, and where; return the exit code."""
    if isinstance(error, SystemExit):
        board.fail(f"called sys.exit({error.code!r})")
        code = INTERRUPTED
    else:
        by_mpi = type(error).__module__.partition(".")[0] == "mpi4py"
        board.fail(f"{BY_MPI if by_mpi else 'raised ' + type(error).__name__}: {error}")
        code = error.exit_code if isinstance(error, MdattnError) else 4
    if error is not None:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        os.write(stacks, text.encode(errors="replace"))
    return code


def _fail(board: Board, stacks: int, error: BaseException | None) -> None:
    """Take the rank down for an exception that nobody caught in a thread."""
    if not isinstance(error, SystemExit):  # a thread may end itself like this
        _exit(board, _note_failure(board, stacks, error))


def _exit(board: Board, code: int) -> None:
    """Exit at once: no thread is waited for, and no destructor talks to ranks that are gone."""
    board.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    if board.record().state == ENDED and "PMI_FD" in os.environ:
        # MPICH takes leave of its launcher in an exit handler, and is killed if it doesn't.
        ctypes.PyDLL(None).exit(code)
    os._exit(code)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies."""
    set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(INTERRUPTED)


# -- the parent -----------------------------------------------------------------------------------


class Watchdog:
    """What the parent does until the rank is gone."""

    def __init__(self, child: int, board: Board, stacks: int) -> None:
        self.child = child
        self.board = board
        self.stacks = stacks
        self.launched = launcher()
        self.launcher_pid = os.getppid()
        self.scribe = Scribe(board, child)
        self._stop_asked = 0.0
        self._late_since: tuple[int, int] | None = None
        self._excuse = Excuse()
        self._excused_until = 0.0
        self._stopped_since = 0.0
        self._looked = time.monotonic()
        self._suspended = 0.0
        self._phase: tuple[int, int] | None = None
        name_this("mdattn-watchdog")

    def run(self) -> int:
        """Watch until the rank has ended, or must; return the exit code."""
        self.scribe.start()
        signals = {*STOPS, signal.SIGCHLD}
        while True:
            arrived = signal.sigtimedwait(signals, self._until_next_look())
            if arrived:  # perhaps a rank is lost, and its watchdog or the launcher says so
                self.scribe.hurry.set()
            if arrived and arrived.si_signo in STOPS and self._second_stop():
                return self._stop_now()
            code = self._look()
            if code is not None:
                return code

    def _until_next_look(self) -> float:
        """Seconds. A look costs as much as a tenth of a short step, so there are few of them."""
        left = self.board.deadline - time.monotonic()
        return min(_LOOK, max(_POLL, left)) if self._late_since is None else _POLL

    def _second_stop(self) -> bool:
        """Take note of a signal to stop; True if it is one too many to be polite."""
        now = time.monotonic()
        first, self._stop_asked = self._stop_asked, self._stop_asked or now
        self.board.request_stop()
        return first > 0 and now - first > _REPEAT

    def _stop_now(self) -> int:
        self._kill()
        within(_NOTE_PATIENCE, self.scribe.look)  # was it a launcher that mourns a rank?
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
        if self.scribe.lost:
            self._kill()
            return INTERRUPTED
        return self._lost_peer() or self._late()

    def _ended(self, code: int) -> int:
        """Judge the end of the rank: in order, or a death."""
        record = self.board.record()
        if record.state == ENDED and code >= 0:
            within(_NOTE_PATIENCE, self.scribe.publish)
            return code
        if record.fault:
            return self._end_job(record.fault, code=record.exit_code or INTERRUPTED)
        if code < 0:
            return self._end_job(f"was killed by signal {-code} ({_signal_name(-code)})")
        return self._end_job(f"exited with code {code} and without a word")

    def _late(self) -> int | None:
        """End the job if the rank has passed the deadline of its phase and has no excuse."""
        record, now = self.board.record(), time.monotonic()
        limit = min(record.deadline, self._stopped_limit(now)) + self._grace(record.progress, now)
        # Who can't see whom it waits for lets that one's own watchdog speak first.
        blind = _BLIND if record.waiting and not record.folder else 0.0
        if not record.deadline or now < limit + blind:
            self._late_since = None
            return None
        if self._late_since != record.progress:  # the rank may be in the middle of storing it
            self._late_since = record.progress
            return None
        if record.state == ENDED:
            self._kill()
            return record.exit_code
        if not self._stopped_since and self._is_excused(record, now):
            return None
        page = bytes(self.board.page)
        self._ask_for_stacks()
        if self.board.record().state == ENDED:
            return None
        self._kill()
        self.board.page[:] = page  # being asked may have woken it up; it was too late
        stopped = "was stopped (by SIGSTOP?) and " if self._stopped_since else ""
        seconds = limit - record.since
        return self._end_job(f"{stopped}passed its deadline of {seconds:.3g} s", late=True)

    def _grace(self, phase: tuple[int, int], now: float) -> float:
        """Seconds of this phase in which this process was stopped, and the rank probably too."""
        asleep, self._looked = now - self._looked, now
        if self._phase != phase:
            self._phase, self._suspended = phase, 0.0
        elif asleep > _SUSPENDED:
            self._suspended += asleep
        return self._suspended

    def _stopped_limit(self, now: float) -> float:
        """When a stopped rank must go on; the deadlines of some phases are very long."""
        if process_state(self.child) != "T":
            self._stopped_since = 0.0
            return float("inf")
        self._stopped_since = self._stopped_since or now
        return self._stopped_since + _STOPPED

    def _is_excused(self, record: Record, now: float) -> bool:
        if now >= self._excused_until:
            others = within(_NOTE_PATIENCE, self.scribe.records) or []
            if not self._excuse.holds(record, others):
                return False
            self._excused_until = now + _LOOK_AGAIN
        return True

    def _lost_peer(self) -> int | None:
        peer = self.scribe.vanished
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
        within(_NOTE_PATIENCE, self.scribe.publish)
        records = self._all_records()
        own = self.board.record()
        first = first_lost([own, *(other for other in records if other.rank != own.rank)])
        if first.rank != own.rank and first.fault:
            self._wait_for_note()
        stack = self._stack() if first.rank == own.rank else ""
        waited = f"was waited for by rank {own.rank}, which {own.fault}; it was last seen"
        self._write_note(first, first.fault or waited, stack)
        return code

    def _all_records(self) -> list[Record]:
        """Where everybody is now. The launcher may be about to kill all: no time is lost."""
        own, asked = self.board.record(), time.time()
        end = time.monotonic() + _SCRIBE_POLL  # by then all have published by themselves
        within(_NOTE_PATIENCE, self.scribe.wake_others)
        while own.folder:
            records = within(_NOTE_PATIENCE, self.scribe.records) or []
            others = [record for record in records if record.rank != own.rank]
            current = all(other.heartbeat > asked for other in others)
            if time.monotonic() > end or (current and len(records) == own.size):
                return records
            time.sleep(0.01)
        return []

    def _write_note(self, culprit: Record, what: str, stack: str) -> None:
        """Write the death note and the bulletin, and say it on stderr if nobody has."""

        def write() -> bool:
            return self.scribe.write_note(note)

        records = within(_NOTE_PATIENCE, self.scribe.records) or []
        note = death_note.compose(
            culprit,
            what,
            records,
            stack=stack,
            command=death_note.resume_command(self.launched, max(1, culprit.size)),
            folder=culprit.folder,
        )
        if within(_NOTE_PATIENCE, write) is not False:
            within(_NOTE_PATIENCE, lambda: print(death_note.paragraph(note), file=sys.stderr))
            within(_NOTE_PATIENCE, sys.stderr.flush)

    def _wait_for_note(self) -> None:
        end = time.monotonic() + _NOTE_PATIENCE
        while time.monotonic() < end and not within(_NOTE_PATIENCE, self.scribe.note_exists):
            time.sleep(_POLL)

    def _ask_for_stacks(self) -> None:
        """Let the rank's C-level handler write its stacks; a stopped one can't."""
        if self._stopped_since:
            return
        with suppress(ProcessLookupError):
            os.kill(self.child, _DUMP)
        size = -1
        for _ in range(10):
            time.sleep(0.05)
            before, size = size, os.fstat(self.stacks).st_size
            if size and size == before:
                return

    def _stack(self) -> str:
        return os.pread(self.stacks, 1 << 16, 0).decode(errors="replace")

    def _kill(self) -> None:
        """Kill the rank; don't wait long for one that the kernel can't kill yet."""
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        for _ in range(20):
            with suppress(ChildProcessError):
                if os.waitpid(self.child, os.WNOHANG) == (0, 0):
                    time.sleep(0.01)
                    continue
            return


class Excuse:
    """Why a rank may be past its deadline: it waits for one that is behind, busy and watched."""

    def __init__(self) -> None:
        self._beats: dict[int, tuple[int, float]] = {}

    def holds(self, own: Record, others: list[Record]) -> bool:
        """Whether somebody is behind `own`, alive and in time."""
        if not own.waiting and own.phase.split(" ")[0] not in _SHARED_PHASES:
            return False
        now = time.monotonic()
        excused = False
        for other in others:
            if other.rank == own.rank:
                continue
            beats, since = self._beats.get(other.rank, (-1, now))
            if beats != other.beats:
                since = now
                self._beats[other.rank] = other.beats, now
            behind = other.is_behind(own) and other.state != ENDED and not other.fault
            excused |= behind and now - since < _DEAF
        return excused


def first_lost(records: list[Record]) -> Record:
    """Tell who failed or was late first.

    Deaths go by the clock: what follows from one comes after it, and an error of MPI follows from
    any other death. Lateness goes by progress: who waits has come further than who is waited for,
    or says that it waits.
    """
    dead = [record for record in records if record.fault and not record.late]
    if dead:
        return min(dead, key=lambda record: (record.fault.startswith(BY_MPI), record.fault_time))
    own = records[0]
    awaited = [
        record
        for record in records
        if (record.group == own.group or record.is_behind(own)) and record.state != ENDED
    ]
    return min(
        awaited or [own],
        key=lambda record: (
            record.progress,
            not record.stopped,
            record.waiting,
            record.since_wall,
        ),
    )


class Scribe(threading.Thread):
    """The watchdog's hand for files; if a file system hangs, this thread does, and nobody else."""

    def __init__(self, board: Board, child: int) -> None:
        super().__init__(name="mdattn-scribe", daemon=True)
        self.board = board
        self.child = child
        self.hurry = threading.Event()
        self.lost = False  # a rank was announced as lost
        self.vanished: Record | None = None  # a rank of this host whose watchdog is gone
        self._published = b""
        self._heartbeat = 0.0
        self._peers: dict[int, int] = {}  # rank: its watchdog's pid

    def run(self) -> None:
        """Publish and look around, again and again."""
        while True:
            hurried = self.hurry.wait(_SCRIBE_POLL)
            self.hurry.clear()
            with suppress(OSError):
                self.publish(at_once=hurried)
            with suppress(OSError):
                self.look()

    def publish(self, *, at_once: bool = True) -> None:
        """Copy the page into the run folder; or only if it changed or the heartbeat is due."""
        record = self.board.record()
        if not record.folder:
            return
        state, now = process_state(self.child), time.monotonic()
        page = bytes(self.board.page)
        same = page == self._published and state == record.process_state
        if same and now < self._heartbeat and not at_once:
            return
        self.board.beat(state)
        self._published = bytes(self.board.page)
        self._heartbeat = now + _HEARTBEAT
        BoardFile(record.folder).publish(self._published, record.rank, record.size)

    def look(self) -> None:
        """Look for a bulletin, and for watchdogs of this host that have vanished."""
        record = self.board.record()
        if not record.folder:
            return
        if BoardFile(record.folder).lost(record.job):
            self.lost = True
            _wake_up()
        if len(self._peers) < record.size:
            self._meet(record)
        for rank, pid in self._peers.items():
            if pid and process_state(pid) in ("", "Z", "X"):
                self._peers[rank] = 0
                last = {other.rank: other for other in self.records()}.get(rank)
                # In order, or with a fault that it will write about itself.
                if last and last.state != ENDED and not last.fault:
                    self.vanished = last
                    _wake_up()

    def _meet(self, own: Record) -> None:
        """Remember the watchdogs of all ranks; 0 for those whose pids mean nothing here."""
        for other in self.records():
            here = other.rank != own.rank and other.shares_pids_with(own)
            self._peers.setdefault(other.rank, other.watchdog_pid if here else 0)

    def wake_others(self) -> None:
        """Have the watchdogs of this host publish now; who isn't one ignores this signal."""
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
        """Write the death note unless there is one, then the bulletin; whether this one counts."""
        record = self.board.record()
        if not record.folder:
            return True
        written = True
        with suppress(OSError):  # a full disk: stderr gets the note anyway
            written = death_note.write(record.folder, note)
        with suppress(OSError):
            BoardFile(record.folder).announce(record.job, note["rank"])
        return written


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """Call `function` in a thread; None if it raises or isn't back in time."""
    result: list[T] = []

    def call() -> None:
        with suppress(OSError):
            result.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def _wake_up() -> None:
    """Let the watchdog look now: it waits for this signal among others."""
    os.kill(os.getpid(), signal.SIGCHLD)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"
