"""Where a GPU's time went."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mdattn_mpi.devices.cuda.gpu import Event
from mdattn_mpi.devices.cuda.order import Queue

MOST_OPEN = 256  # pairs of events before they are looked at


class Clock:
    """Pairs of events, looked at once both are past.

    Parameters
    ----------
    runs
        Whether anybody wants to know: events take a lone short item some microseconds.

    """

    def __init__(self, runs: bool) -> None:
        self.runs = runs
        self._seconds = {"compute": 0.0, "exchange": 0.0, "merge": 0.0}
        self._open: deque[tuple[str, Sequence[Event], Event]] = deque()

    def time(self, queue: Queue) -> Event | None:
        """Mark a place in `queue`; None where nobody wants to know."""
        return queue.mark(timed=True) if self.runs else None

    def computed(self, start: Event | None, end: Event | None) -> None:
        """All of an item's attention went on from `start` to `end`, merges and waits included."""
        if start is not None and end is not None:
            self._add("compute", (start,), end)

    def merged(self, start: Event | None, end: Event | None) -> None:
        """A merge went on from `start` to `end`."""
        if start is not None and end is not None:
            self._add("merge", (start,), end)

    def waited(self, ready: Sequence[Event], arrived: Event) -> None:
        """Kernels were through with `ready` and had to wait until `arrived`."""
        self._add("exchange", ready, arrived)

    def seconds(self) -> dict[str, float]:
        """Add up what is past."""
        while self._open and all(event.is_done for event in (*self._open[0][1], self._open[0][2])):
            kind, starts, end = self._open.popleft()
            taken = max(0.0, min(end - start for start in starts)) / 1e3
            self._seconds[kind] += taken
            if kind == "exchange":
                self._seconds["compute"] -= taken
        return dict(self._seconds)

    def _add(self, kind: str, starts: Sequence[Event], end: Event) -> None:
        if not self.runs:
            return
        self._open.append((kind, starts, end))
        if len(self._open) > MOST_OPEN:
            self.seconds()
