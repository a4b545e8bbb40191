"""Where a rank's time goes, phase by phase; the watchdog sees every change."""

from __future__ import annotations

from collections import defaultdict
from time import monotonic_ns

from mdattn_mpi.lockstep import Board, Deadlines
from mdattn_mpi.runner.events import Note

OFTEN = 50_000_000  # nanoseconds after which what phases took is looked at


class Timer:
    """How long a phase with some work may last, and has lasted lately, in nanoseconds."""

    __slots__ = ("limit", "longest", "meanwhile", "phase", "spent", "work")

    def __init__(self, phase: str, work: int, meanwhile: tuple[str, ...]) -> None:
        self.phase = phase
        self.work = work
        self.meanwhile = meanwhile or (phase,)
        self.limit = self.longest = self.spent = 0


class PhaseClock:
    """Seconds that the rank's main thread spent in each phase; it is always in one.

    Phases change several times an item, which is felt where items take a millisecond: so one call
    ends a phase and begins the next, with one look at the time, and leaves the rest for later.
    """

    def __init__(self, board: Board, deadlines: Deadlines, note: Note | None = None) -> None:
        self.board = board
        self.deadlines = deadlines
        self._note = note
        self._item = ""
        self.seconds: dict[str, float] = defaultdict(float)
        self._timers: dict[tuple[str, int], Timer] = {}
        self._timer = Timer("", 0, ())  # of the phase in which the rank is
        self._since = self._learned = monotonic_ns()

    def enter(
        self, phase: str, item: str = "", work: int = 0, meanwhile: tuple[str, ...] = ()
    ) -> None:
        """End the phase before, and publish the one that begins, with its deadline.

        Parameters
        ----------
        phase, item
            What begins, with which item.
        work
            The item's operations: deadlines are scaled by them.
        meanwhile
            Phases that this rank or others may be in until this one is over, `phase` among them; it
            may last as long as any of those. Always the same for one phase.

        """
        timer = self._timers.get((phase, work)) or self._keep(Timer(phase, work, meanwhile))
        now = self.board.enter(timer.phase, item, 1e-9 * timer.limit)
        before, took = self._timer, now - self._since
        before.spent += took
        if took > before.longest:
            before.longest = took
        if self._note and before.phase:
            self._note((before.phase, self._item, self._since, now))
        self._timer, self._since, self._item = timer, now, item
        if now - self._learned > OFTEN:
            self._learn(now)

    def stop(self) -> None:
        """End the last phase: what comes next isn't timed."""
        now = monotonic_ns()
        if self._note and self._timer.phase:
            self._note((self._timer.phase, self._item, self._since, now))
        self._timer.spent += now - self._since
        self._timer.longest = max(self._timer.longest, now - self._since)
        self._learn(now)
        self._timer = Timer("", 0, ())

    def _keep(self, timer: Timer) -> Timer:
        timer.limit = int(1e9 * self.deadlines.of(timer.meanwhile, timer.work))
        timer.longest = timer.spent = 0
        self._timers[timer.phase, timer.work] = timer
        return timer

    def _learn(self, now: int) -> None:
        """Let deadlines follow what phases have taken, and start counting again."""
        for timer in self._timers.values():
            if timer.spent:
                self.seconds[timer.phase] += 1e-9 * timer.spent
                self.deadlines.took(timer.phase, 1e-9 * timer.longest, timer.work)
        self._timers.clear()
        self._keep(self._timer)
        self._learned = now
