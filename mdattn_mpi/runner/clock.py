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
    def phase(self, name: str, item: str = "", *, flops: int = 0) -> Iterator[None]:
        """Enter a phase: publish it with its deadline, and time it."""
        self.board.enter(name, item=item, deadline=self.deadlines.of(name, flops))
        start = perf_counter()
        yield
        elapsed = perf_counter() - start
        self.seconds[name] += elapsed
        self.deadlines.took(name, elapsed, flops)
