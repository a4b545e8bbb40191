"""Where a rank's time goes, phase by phase; the watchdog is told at every change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from mdattn_mpi.lockstep import Board, Deadlines


class PhaseClock:
    """Seconds that the rank's main thread spent in each phase."""

    def __init__(self, board: Board, deadlines: Deadlines) -> None:
        self.board = board
        self.deadlines = deadlines
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(
        self, name: str, item: str = "", *, work: int = 0, meanwhile: tuple[str, ...] = ()
    ) -> Iterator[None]:
        """Enter a phase: publish it with its deadline, and time it.

        Parameters
        ----------
        name, item
            What begins, with which item.
        work
            The item's operations: deadlines are scaled by them.
        meanwhile
            Phases that other ranks may still be in; this one may last as long as those.

        """
        deadline = max(self.deadlines.of(each, work) for each in (name, *meanwhile))
        self.board.enter(name, item=item, deadline=deadline)
        start = perf_counter()
        yield
        elapsed = perf_counter() - start
        self.seconds[name] += elapsed
        self.deadlines.took(name, elapsed, work)
