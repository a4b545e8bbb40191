"""The results of a query shard before they are one: which rows have how many, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mdattn_mpi.devices.cuda.gpu import Event
from mdattn_mpi.devices.cuda.memory import DeviceArray
from mdattn_mpi.devices.cuda.merge import PARTS
from mdattn_mpi.devices.cuda.order import Fence, Queue
from mdattn_mpi.problem import Span

WIDE_PARTS = 2  # partial results in float32 that wait for being folded; one more is on its way


@dataclass(eq=False)
class Launched:
    """An attention call, and where its result lies."""

    rows: Span
    lane: Queue
    end: Fence
    output: DeviceArray
    lse: DeviceArray


@dataclass(eq=False)
class Region:
    """Some rows of the query, and their results so far; spans of rows count from its first.

    In a region of `partial` results all are in float32 and are rounded once, when they are merged.
    Elsewhere, and where the kernel can't, the first result for a row goes straight to where the
    output will be, in 16 bits: where no other comes, nothing is left to do.

    Further results get memory of their own. They are folded into one in float32 when there are too
    many.
    """

    rows: Span  # of the query
    q: DeviceArray
    output: DeviceArray
    lse: DeviceArray
    partial: bool
    wide: DeviceArray | None = None  # the first results, in float32
    begin: Fence = field(default_factory=dict)  # what comes before `wide` is written
    first: list[Launched] = field(default_factory=list)
    more: list[Launched] = field(default_factory=list)
    folded: tuple[DeviceArray, DeviceArray] | None = None  # float32, of all rows

    def covers(self, rows: Span) -> bool:
        """Whether any of `rows` has a result already."""
        return self.folded is not None or any(overlap(rows, call.rows) for call in self.first)

    @property
    def is_full(self) -> bool:
        """Whether results have to be folded before there is one more."""
        if self.wide is not None:
            return len(self.more) >= WIDE_PARTS
        return len(self.first) + len(self.more) >= PARTS

    @property
    def unmerged(self) -> list[Span]:
        """The rows whose output isn't where it belongs yet."""
        if self.folded or self.wide is not None:
            return [Span(0, len(self.rows))]
        alone = [
            call.rows
            for call in self.first
            if not any(overlap(call.rows, other.rows) for other in self.more)
        ]
        return complement(alone, len(self.rows))


@dataclass(eq=False)
class Partials:
    """The results of one query shard."""

    scale: float
    softcap: float
    output: DeviceArray
    lse: DeviceArray
    regions: list[Region]
    begin: Fence  # what its calls come after, whichever lane they are in
    start: Event | None
    calls: int = 0

    def region(self, rows: Span) -> Region:
        """Find the region that `rows` are in."""
        return next(each for each in self.regions if rows.start < each.rows.stop)


def complement(spans: Sequence[Span], length: int) -> list[Span]:
    """Find the runs of ``[0, length)`` that no span covers."""
    found, start = [], 0
    for span in sorted(spans):
        found.append(Span(start, span.start))
        start = max(start, span.stop)
    return [span for span in (*found, Span(start, length)) if span.stop > span.start]


def pieces_of(rows: Span, calls: Sequence[Launched]) -> list[Span]:
    """Cut `rows` where a call begins or ends."""
    cuts = {rows.start, rows.stop}
    for call in calls:
        cuts |= {cut for cut in (call.rows.start, call.rows.stop) if rows.start < cut < rows.stop}
    return [Span(start, stop) for start, stop in pairwise(sorted(cuts))]


def overlap(one: Span, other: Span) -> bool:
    """Whether two spans have a row in common."""
    return max(one.start, other.start) < min(one.stop, other.stop)
