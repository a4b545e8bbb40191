"""Where a rank's time goes, phase by phase; the watchdog is told at every change."""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter
from types import TracebackType

from mdattn_mpi.lockstep import Board, Deadlines


class PhaseClock:
    """Seconds that the rank's main thread spent in each phase."""

    def __init__(self, board: Board, deadlines: Deadlines) -> None:
        self.board = board
        self.deadlines = deadlines
        self.seconds: dict[str, float] = defaultdict(float)

    def phase(
        self, name: str, item: str = "", *, work: int = 0, meanwhile: tuple[str, ...] = ()
    ) -> Phase:
        """Enter a phase: publish it with its deadline, and time it until the block ends.

        Parameters
        ----------
        name, item
            What begins, with which item.
        work
            The item's operations: deadlines are scaled by them.
        meanwhile
            Phases that other ranks may still be in; this one may last as long as those.

        """
        deadline = self.deadlines.of(name, work)
        for other in meanwhile:
            deadline = max(deadline, self.deadlines.of(other, work))
        self.board.enter(name, item, deadline)
        return Phase(self, name, work)


class Phase:
    """A phase that has begun. A class costs a third of what a generator would."""

    __slots__ = ("clock", "name", "start", "work")

    def __init__(self, clock: PhaseClock, name: str, work: int) -> None:
        self.clock = clock
        self.name = name
        self.work = work
        self.start = perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            elapsed = perf_counter() - self.start
            self.clock.seconds[self.name] += elapsed
            self.clock.deadlines.took(self.name, elapsed, self.work)
