"""Who is to blame, judged from records and the time alone: no processes and no files here."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mdattn_mpi.errors import InterruptedJobError
from mdattn_mpi.lockstep.record import ENDED, Record

INTERRUPTED = InterruptedJobError.exit_code
BY_MPI = "got an error from MPI"  # mostly because the rank at the other end has died
STOPPED = 60.0  # seconds that a rank alone may be stopped, wherever it is
SUSPENDED = 2.0  # seconds between two looks, after which the watchdog itself must have been stopped
BLIND = 1.5  # seconds more for a rank that waits for others whose records it can't read
SILENT = 10.0  # seconds without a heartbeat after which a watchdog counts as gone

# Phases in which a rank may be waiting for another one without having said so.
SHARED_PHASES = frozenset(
    {"start", "begin", "enqueue", "collect", "agree", "claim", "groups", "end"}
)


class Verdict(NamedTuple):
    """What happened to a rank, and the exit code that follows."""

    what: str
    exit_code: int


def verdict_on_exit(record: Record, code: int) -> Verdict | None:
    """Judge the exit of a rank with `code`, negative for a signal; None if it was in order."""
    if record.state == ENDED and code >= 0:
        return None
    if record.fault:
        return Verdict(record.fault, record.exit_code or INTERRUPTED)
    if code < 0:
        return Verdict(f"was killed by signal {-code} ({_signal_name(-code)})", INTERRUPTED)
    return Verdict(f"exited with code {code} without leaving the job", INTERRUPTED)


class Lateness:
    """Whether a rank has passed the deadline of its phase. Asked at every look.

    Attributes
    ----------
    suspected
        The deadline has passed; the next look decides.
    stopped
        The kernel says that the rank is stopped.

    """

    def __init__(self, now: float) -> None:
        self.suspected = False
        self.stopped = False
        self._progress: tuple[int, int] | None = None
        self._looked = now
        self._stopped_since = 0.0
        self._suspended = 0.0  # of this phase, and the rank probably too

    def look(self, record: Record, now: float, *, stopped: bool) -> float | None:
        """Return how many seconds the rank had, if they are over; else None."""
        self._look_for_suspension(record, now)
        self.stopped = stopped
        self._stopped_since = (self._stopped_since or now) if stopped else 0.0
        stopped_until = self._stopped_since + STOPPED if stopped else float("inf")
        limit = min(record.deadline, stopped_until) + self._suspended
        # A rank that can't see whom it waits for leaves the first word to their watchdogs.
        blind = BLIND if record.waiting and not record.folder else 0.0
        over = record.deadline > 0 and now >= limit + blind
        # Only the second time: the rank may be in the middle of storing what begins.
        late = over and self.suspected
        self.suspected = over
        return limit - record.since if late else None

    def _look_for_suspension(self, record: Record, now: float) -> None:
        asleep, self._looked = now - self._looked, now
        if record.progress != self._progress:
            self._progress, self._suspended, self.suspected = record.progress, 0.0, False
        elif asleep > SUSPENDED:
            self._suspended += asleep


class Heartbeats:
    """Which watchdogs are still alive."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}  # rank: heartbeats, and since when so many

    def alive(self, records: Iterable[Record], now: float) -> list[Record]:
        """Leave out those from which nothing new has come for too long."""
        found = []
        for record in records:
            beats, since = self._last.get(record.rank, (-1, now))
            if beats != record.beats:
                since = now
                self._last[record.rank] = record.beats, now
            if now - since < SILENT:
                found.append(record)
        return found


def may_wait_longer(own: Record, alive: Iterable[Record]) -> bool:
    """Whether a late rank waits for one that is behind it, has no fault and is watched itself."""
    if not own.waiting and own.phase.split(" ")[0] not in SHARED_PHASES:
        return False
    return any(
        other.is_behind(own) and other.state != ENDED and not other.fault
        for other in alive
        if other.rank != own.rank
    )


def is_clear(own: Record, others: Sequence[Record], asked: float) -> bool:
    """Whether `others`, all but `own`, say enough to blame one; they were asked at that time.

    An error of MPI is a rank's first sign of a death that the dead one's own watchdog may not have
    noticed yet.
    """
    explained = not _by_mpi(own) or any(each.fault and not _by_mpi(each) for each in others)
    return explained and all(other.heartbeat > asked for other in others)


def first_lost(own: Record, others: Sequence[Record]) -> Record:
    """Tell who failed or was late first.

    Deaths are judged by time: what follows from one comes after it, and an error of MPI follows
    from any other death. Lateness is judged by progress: a rank that waits has come further than
    the one that it waits for, or says that it waits.
    """
    records = [own, *others]
    dead = [record for record in records if record.fault and not record.late]
    if dead:
        return min(dead, key=lambda record: (_by_mpi(record), record.fault_time))
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


def _by_mpi(record: Record) -> bool:
    return record.fault.startswith(BY_MPI)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"
