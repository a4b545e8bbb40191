"""Exact attention in NumPy: blocks that stay in cache, softmax on the fly, one task a tile.

The work is cut into tiles: some query tokens of one kv head, with all query heads that read it
stacked as rows, so that K and V are never copied per query head. A tile walks over the keys block
by block and keeps the sums of ``exp(score - reference)`` and of ``exp(score - reference) · value``
(online softmax: Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).

Tiles and blocks are cut by the shapes alone, so that the bytes of a result don't depend on the
number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mdattn_mpi.devices.cpu import exponential
from mdattn_mpi.devices.cpu.exponential import Exponential
from mdattn_mpi.devices.cpu.partial import Array, Floats, Partial
from mdattn_mpi.devices.cpu.tile import Exp, Poll, Sight, Tile
from mdattn_mpi.mask import Band, Span

Task = Callable[[Poll], None]

# Large enough that threads seldom meet at the interpreter's lock, small enough for a core's share
# of the last cache.
TILE_ROWS = 1024  # query tokens × query heads of one kv head


class BlockedAttention:
    """Runs tiles on `threads` threads, the caller's own among them.

    `poll` is called between blocks, by the caller's thread alone: whatever must be kept going
    while the rank computes. `exp` is the fastest that is installed unless given.
    """

    def __init__(self, threads: int, poll: Poll, exp: Exponential | None = None) -> None:
        self._poll = poll
        self._exp = exp.apply if exp else exponential.exp
        self._helpers = threads - 1
        self._pool = ThreadPoolExecutor(self._helpers, "attention") if self._helpers else None

    def attend(self, partial: Partial, rows: Span, k: Array, v: Array, band: Band) -> None:
        """Add the attention of the query's `rows` to what they see of `k` and `v`.

        `k` is ``[Skv, Nkv, H]``, `v` ``[Skv, Nkv, Hv]``.
        """
        self._run(_tiles(partial, rows, k, v, band, self._exp))

    def finish(self, partial: Partial, sinks: Array | None = None) -> tuple[Array, Floats]:
        """Output ``[Sq, Nq, Hv]`` in the dtype of the query, LSE ``[Sq, Nq]`` in float32.

        Where float32 can't hold it, the LSE is infinite.
        """
        tokens = len(partial.q)
        out = np.empty(partial.output.shape, partial.q.dtype)
        lse = np.empty(partial.weight.shape, np.float32)
        self._run(
            _rounding(partial, slice(start, start + TILE_ROWS), out, lse, sinks)
            for start in range(0, tokens, TILE_ROWS)
        )
        return out, lse

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()

    def _run(self, tasks: Iterator[Task]) -> None:
        queue = deque(tasks)
        helpers = min(self._helpers, len(queue) - 1)
        running = [self._pool.submit(_drain, queue, _rest) for _ in range(helpers) if self._pool]
        try:
            _drain(queue, self._poll)
        finally:
            queue.clear()
            for helper in running:
                helper.result()


def _drain(queue: deque[Task], poll: Poll) -> None:
    with np.errstate(all="ignore"):  # NaN and infinity travel to the rows that they touch
        while True:
            try:
                task = queue.popleft()
            except IndexError:
                return
            task(poll)


def _rest() -> None:
    """Poll nothing: the caller's thread does it."""


def _tiles(
    partial: Partial, rows: Span, k: Array, v: Array, band: Band, exp: Exp
) -> Iterator[Task]:
    """Cut `rows` into tiles, which know how far before and after a row's own number it sees."""
    if not len(k):
        return
    corner = len(k) - len(rows)
    low = -len(rows) if band.before is None else corner - band.before
    high = len(k) if band.after is None else corner + band.after
    group = partial.q.shape[1] // k.shape[1]
    step = max(1, TILE_ROWS // group)
    starts = range(rows.start, rows.stop, step)
    for kv_head in range(k.shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        # Backwards: under a causal mask the last tile is the longest.
        for start in reversed(starts):
            tokens = Span(start, min(start + step, rows.stop))
            shift = start - rows.start
            sight = Sight(low + shift, high + shift)
            yield Tile(partial, tokens, heads, k[:, kv_head], v[:, kv_head], sight, exp)


def _rounding(
    partial: Partial, tokens: slice, out: Array, lse: Floats, sinks: Array | None
) -> Task:
    def task(poll: Poll) -> None:
        partial.finish(tokens, out, lse, sinks)
        poll()

    return task
