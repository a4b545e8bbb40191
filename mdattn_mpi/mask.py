"""What a query may see. Pure arithmetic: no arrays.

A `Mask` is a problem's, in tokens of the sequence. `partition.blocks` cuts it into rectangles, each
of which has a `Band`: all that a kernel has to know of.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index
from typing import NamedTuple

from mdattn_mpi.errors import RejectedError

UNBOUNDED = (-1, -1)  # a window
ASCENDING = "give the first token of each document, ascending, beginning with 0"
MAX_RUNS = 8  # of a rank's tokens, where a mask hides keys; 5 are the most that were seen
MAX_SEGMENTS = 4096  # each is a call of most kernels, and a word in an attribute


@dataclass(frozen=True, order=True)
class Span:
    """The half-open run of tokens, rows or heads ``[start, stop)``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """The same run as a Python slice."""
        return slice(self.start, self.stop)

    def shift(self, by: int) -> Span:
        """Move both ends by `by`."""
        return Span(self.start + by, self.stop + by)

    def meet(self, other: Span) -> Span:
        """Return what is in both; of length 0 where nothing is."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))


class Band(NamedTuple):
    """The mask of one rectangle of ``m`` rows and ``n`` keys, as kernels have it.

    Row ``i`` sees the keys from ``i + n - m - before`` to ``i + n - m + after``: the diagonal ends
    in the lower right corner. None: no bound on that side.
    """

    before: int | None
    after: int | None

    def pairs(self, rows: int, keys: int) -> int:
        """Query–key pairs that it lets through."""
        far, near = self
        seen = rows * keys if near is None else seen_pairs(rows, keys, keys - rows + near)
        return seen if far is None else seen - seen_pairs(rows, keys, keys - rows - far - 1)


FULL = Band(None, None)
LOWER_RIGHT = Band(None, 0)  # causal, where both ends meet


@dataclass(frozen=True)
class Mask:
    """Query ``i`` sees key ``j`` if ``low <= j - i <= high`` and both are of one document.

    None: no bound on that side. Without `documents` the whole sequence is one.
    """

    low: int | None = None
    high: int | None = None
    documents: tuple[Span, ...] = ()

    @property
    def hides_keys(self) -> bool:
        """Whether some queries are far from some keys: beyond what causality hides."""
        return self.low is not None or len(self.documents) > 1

    def reach(self, keys: int) -> int:
        """Bound how many keys, of so many, a run of rows sees beside those of its own tokens."""
        if self.low is not None and self.high is not None:
            keys = min(keys, self.high - self.low)
        return min(keys, max(map(len, self.documents), default=keys))

    def pairs(self, rows: Span, keys: Span) -> int:
        """Count the pairs that `rows` see of `keys`."""
        parts = self.parts(rows, keys) if self.documents else [(rows, keys)]
        return sum(self._band_pairs(*part) for part in parts)

    def seen(self, rows: Span, keys: Span) -> Iterator[Span]:
        """Yield the runs of `keys` that any of `rows` sees, ascending."""
        for part, among in self.parts(rows, keys) if self.documents else [(rows, keys)]:
            low = among.start if self.low is None else part.start + self.low
            high = among.stop if self.high is None else part.stop + self.high
            if len(run := among.meet(Span(low, max(low, high)))) and len(part):
                yield run

    def parts(self, rows: Span, keys: Span) -> Iterator[tuple[Span, Span]]:
        """Pair what is of one document in both, document by document."""
        first = max(0, bisect_right(self._starts, max(rows.start, keys.start)) - 1)
        for document in self.documents[first:]:
            if document.start >= min(rows.stop, keys.stop):
                return
            part, among = document.meet(rows), document.meet(keys)
            if len(part) and len(among):
                yield part, among

    def pairs_before(self, row: int, keys: int) -> int:
        """Count the pairs of all rows before `row`, of a sequence of so many keys."""
        if not self.documents:
            return self._band_pairs(Span(0, row), Span(0, keys))
        index = bisect_right(self._starts, row) - 1
        document = self.documents[index]
        return self._sums[index] + self._band_pairs(Span(document.start, row), document)

    @cached_property
    def _starts(self) -> list[int]:
        return [document.start for document in self.documents]

    @cached_property
    def _sums(self) -> list[int]:
        """Pairs of all documents before each."""
        every = (self._band_pairs(document, document) for document in self.documents)
        return [0, *accumulate(every)]

    def _band_pairs(self, rows: Span, keys: Span) -> int:
        """Count the pairs within the bounds alone."""
        if not len(rows) or not len(keys):
            return 0
        shift = rows.start - keys.start
        sizes = len(rows), len(keys)
        upper = sizes[0] * sizes[1] if self.high is None else seen_pairs(*sizes, shift + self.high)
        return upper - (0 if self.low is None else seen_pairs(*sizes, shift + self.low - 1))


def seen_pairs(q_rows: int, kv_rows: int, diagonal: int) -> int:
    """Count the pairs with ``0 <= j < kv_rows`` and ``j <= i + diagonal``."""
    first = max(0, -diagonal)  # the first row that sees a key
    full = max(first, min(q_rows, kv_rows - 1 - diagonal))  # the first row that sees all keys
    if first >= q_rows:
        return 0
    ramp = full - first
    return ramp * (first + diagonal + 1) + ramp * (ramp - 1) // 2 + (q_rows - full) * kv_rows


def window_of(given: object) -> tuple[int, int]:
    """Take two integers, NumPy's too, as a window.

    Raises
    ------
    RejectedError
        They aren't, or one is below -1.

    """
    try:
        before, after = map(index, given)  # type: ignore[call-overload]
        if min(before, after) >= -1:
            return before, after
    except (TypeError, ValueError):
        pass
    raise RejectedError(
        f"window is {given!r}",
        fix="give two integers, how many keys a query sees before and after the diagonal; -1: all",
    )


def starts_of(given: object) -> tuple[int, ...]:
    """Take integers, NumPy's too, as the first tokens of documents.

    Raises
    ------
    RejectedError
        They aren't.

    """
    try:
        return tuple(map(index, given))  # type: ignore[call-overload]
    except TypeError:
        raise RejectedError("segments aren't integers", fix=ASCENDING) from None


def segments_of(given: object, q_tokens: int, kv_tokens: int) -> tuple[int, ...]:
    """Check the first tokens of a sequence's documents; () where there is only one.

    Raises
    ------
    RejectedError
        They don't ascend from 0 to within the sequence, or there are too many.

    """
    starts, fix = starts_of(given), ASCENDING
    if len(starts) > MAX_SEGMENTS:
        fix = f"pack at most {MAX_SEGMENTS} documents into one item"
        raise RejectedError(f"{len(starts)} segments", fix=fix)
    if starts and q_tokens != kv_tokens:
        raise RejectedError(
            f"segments with {q_tokens} query and {kv_tokens} kv tokens",
            fix="give as many keys as queries, or leave the segments out",
        )
    if starts and starts[0] != 0:
        raise RejectedError(f"segments begin with {starts[0]}", fix=fix)
    for before, start in pairwise(starts):
        if start <= before:
            raise RejectedError(f"segments: {start} comes after {before}", fix=fix)
    if starts and starts[-1] >= q_tokens:
        raise RejectedError(f"segments: {starts[-1]} is none of {q_tokens} tokens", fix=fix)
    return starts if len(starts) > 1 else ()
