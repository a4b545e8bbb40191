"""Where a rank's time goes, phase by phase; the watchdog is told at every change."""

from __future__ import annotations

from collections import defaultdict
from time import monotonic_ns

from mdattn_mpi.lockstep import Board, Deadlines

OFTEN = 50_000_000  # nanoseconds after which what phases took is looked at


class PhaseClock:
    """Seconds that the rank's main thread spent in each phase; it is always in one.

    Phases change five times an item, which is felt where items take a millisecond: so one call ends
    a phase and begins the next, with one look at the time, and leaves the rest for later.
    """

    def __init__(self, board: Board, deadlines: Deadlines) -> None:
        self.board = board
        self.deadlines = deadlines
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._work, self._since = "", 0, 0  # nanoseconds
        self._spent: list[tuple[str, int, int]] = []  # phase, work, nanoseconds
        self._learned = 0
        self._limits: dict[tuple[str, int], float] = {}

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
        limit = self._limits.get((phase, work)) or self._limit(phase, work, meanwhile)
        now = self.board.enter(phase, item, limit)
        self._spent.append((self._phase, self._work, now - self._since))
        self._phase, self._work, self._since = phase, work, now
        if now - self._learned > OFTEN:
            self._learn(now)

    def stop(self) -> None:
        """End the last phase: the rank goes on to what nobody times."""
        now = monotonic_ns()
        self._spent.append((self._phase, self._work, now - self._since))
        self._phase = ""
        self._learn(now)

    def _limit(self, phase: str, work: int, meanwhile: tuple[str, ...]) -> float:
        limit = self._limits[phase, work] = self.deadlines.of(meanwhile or phase, work)
        return limit

    def _learn(self, now: int) -> None:
        for phase, work, nanoseconds in self._spent:
            if phase:
                self.seconds[phase] += 1e-9 * nanoseconds
                self.deadlines.took(phase, 1e-9 * nanoseconds, work)
        self._spent.clear()
        self._limits.clear()
        self._learned = now
