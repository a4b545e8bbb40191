"""Where a rank's time goes, phase by phase; the watchdog is told at every change."""

from __future__ import annotations

from collections import defaultdict
from time import monotonic_ns

from mdattn_mpi.lockstep import Board, Deadlines


class PhaseClock:
    """Seconds that the rank's main thread spent in each phase; it is always in one.

    Phases change six times an item, which is felt where items take a millisecond: one call ends a
    phase and begins the next, with one look at the time.
    """

    def __init__(self, board: Board, deadlines: Deadlines) -> None:
        self.board = board
        self.deadlines = deadlines
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase = ""
        self._work = 0
        self._since = 0  # nanoseconds

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
            may last as long as any of those.

        """
        now = self.board.enter(phase, item, self.deadlines.of(meanwhile or phase, work))
        if self._phase:
            self._took(now)
        self._phase, self._work, self._since = phase, work, now

    def stop(self) -> None:
        """End the last phase: the rank goes on to what nobody times."""
        if self._phase:
            self._took(monotonic_ns())
        self._phase = ""

    def _took(self, now: int) -> None:
        seconds = (now - self._since) * 1e-9
        self.seconds[self._phase] += seconds
        self.deadlines.took(self._phase, seconds, self._work)
