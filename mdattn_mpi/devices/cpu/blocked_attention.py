"""Exact attention in NumPy: blocks that stay in cache, softmax on the fly, one task a tile.

The work is cut into tiles: some query tokens of one kv head, with all query heads that read it
stacked as rows, so that K and V are never copied per query head. A tile walks over the keys block
by block and keeps, in float32, the sums of ``exp(score - reference)`` and of ``exp(score -
reference) · value`` (online softmax: Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv
2205.14135).

What makes it fast is leaving passes over the scores to the matrix products:

- a column of ones in V makes the product with V return the row sums as well;
- a column ``-reference`` in Q against ones in K makes the product with K return scores that have
  the reference subtracted;
- the reference need not be the largest score, only within `HEADROOM` of it: a block whose scores
  stay in reach (nearly all do) is neither searched row by row nor rescaled, and not even searched
  where queries and keys are too short for large scores.

What is left is one product, a maximum at most, one exp in place, one product. Tiles and blocks are
cut by the shapes alone, so that the bytes of a result don't depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.devices.cpu.exponential import fastest_exp
from mdattn_mpi.problem import Span

Array = NDArray[Any]
Floats = NDArray[np.float32]
Poll = Callable[[], None]
Exp = Callable[[Floats], Any]
Spare = deque[Floats]  # memory to use again: fresh memory is slow

# Large enough that threads seldom meet at the interpreter's lock, small enough for a core's share
# of the last cache.
TILE_ROWS = 1024  # query tokens × query heads of one kv head
BLOCK_KEYS = 512
STRIP_ROWS = 128  # on the diagonal of a causal mask: half a square of this is computed in vain
PANEL_KEYS = 4096  # keys of one head that are held in float32 at a time
HEADROOM = np.float32(24)  # exp(24) · 1M keys is far from the end of float32
LOOK = 4  # keys


class Partial:
    """The attention of one query shard to the keys seen so far, in float32.

    Parameters
    ----------
    q
        ``[Sq, Nq, H]``, bfloat16 or float16.
    v_head_dim
        ``Hv`` of the values to come.
    scale
        What scores are multiplied with.

    """

    def __init__(self, q: Array, v_head_dim: int, scale: float) -> None:
        tokens, heads, _ = q.shape
        self.q = q
        self.scale = np.float32(scale)
        # The last column holds the sum of the weights. Undefined where the reference is −∞: nothing
        # has been stored, and touching fresh memory twice would take as long as a product.
        self.sums = np.empty((tokens, heads, v_head_dim + 1), np.float32)
        self.reference = np.full((tokens, heads), -np.inf, np.float32)


class BlockedAttention:
    """Runs tiles on `threads` threads, the caller's own among them.

    `poll` is called between blocks, by the caller's thread alone: whatever must be kept going
    while the rank computes.
    """

    def __init__(self, threads: int, poll: Poll) -> None:
        self._poll = poll
        self._exp = fastest_exp().apply
        self._spare: Spare = deque(maxlen=4)
        self._helpers = threads - 1
        self._pool = ThreadPoolExecutor(self._helpers, "attention") if self._helpers else None

    def attend(self, partial: Partial, rows: Span, k: Array, v: Array, causal: bool) -> None:
        """Add the attention of the query's `rows` to all of `k` and `v`.

        `k` is ``[Skv, Nkv, H]``, `v` ``[Skv, Nkv, Hv]``. `causal` means ``lower_right``.
        """
        for start in range(0, len(k), PANEL_KEYS):
            keys = slice(start, start + PANEL_KEYS)
            diagonal = len(k) - len(rows) - start if causal else None
            self._run(_tiles(partial, rows, (k[keys], v[keys]), diagonal, self._exp, self._spare))

    def finish(self, partial: Partial) -> tuple[Array, Floats]:
        """Output ``[Sq, Nq, Hv]`` in the dtype of the query, LSE ``[Sq, Nq]`` in float32."""
        tokens, heads, width = partial.sums.shape
        out = np.empty((tokens, heads, width - 1), partial.q.dtype)
        lse = np.empty((tokens, heads), np.float32)
        self._run(
            _Finish(partial, slice(start, start + TILE_ROWS), out, lse)
            for start in range(0, tokens, TILE_ROWS)
        )
        return out, lse

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()

    def _run(self, tasks: Iterator[Callable[[Poll], None]]) -> None:
        queue = deque(tasks)
        helpers = min(self._helpers, len(queue) - 1)
        running = [self._pool.submit(_drain, queue, _rest) for _ in range(helpers) if self._pool]
        try:
            _drain(queue, self._poll)
        finally:
            queue.clear()
            for helper in running:
                helper.result()


def _drain(queue: deque[Callable[[Poll], None]], poll: Poll) -> None:
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
    partial: Partial,
    rows: Span,
    kv: tuple[Array, Array],
    diagonal: int | None,
    exp: Exp,
    spare: Spare,
) -> Iterator[Callable[[Poll], None]]:
    """Cut rows × keys into tiles; row ``i`` of `rows` sees keys up to and with ``i + diagonal``."""
    k, v = kv
    group = partial.q.shape[1] // k.shape[1]
    step = max(1, TILE_ROWS // group)
    starts = range(rows.start, rows.stop, step)
    if diagonal is not None:  # leave out tiles that see nothing
        starts = starts[max(0, (-diagonal) // step) :]
    for kv_head in range(k.shape[1]):
        panel = _Panel(k[:, kv_head], v[:, kv_head], len(starts), spare)
        heads = slice(kv_head * group, (kv_head + 1) * group)
        # Backwards: under a causal mask the last tile is the longest.
        for start in reversed(starts):
            tokens = Span(start, min(start + step, rows.stop))
            shift = None if diagonal is None else start - rows.start + diagonal
            yield _Tile(partial, tokens, heads, panel, shift, exp)


class _Panel:
    """Keys and values of one head in float32, each row with a 1 at its end.

    Converted by all threads together, when the first of them needs it.
    """

    def __init__(self, k: Array, v: Array, tiles: int, spare: Spare) -> None:
        self._sources = (k, v)
        self._tiles = tiles
        self._spare = spare
        self._chunks = deque(range(0, len(k), BLOCK_KEYS))
        self._left = len(self._chunks)
        self._lock = threading.Lock()
        self._converted = threading.Event()
        self._error: BaseException | None = None
        self._memory: list[Floats] = []
        self.k: Floats
        self.v: Floats
        self.longest = np.float32(0)  # Euclidean length of a key
        self.finite = True  # all values

    def __len__(self) -> int:
        return len(self._sources[0])

    def convert(self) -> None:
        """Return when all of it is there; does its share of the work."""
        if not self._converted.is_set():
            try:
                self._convert_share()
            except BaseException as error:
                self._error = error
                self._converted.set()  # or the others would wait for ever
                raise
            self._converted.wait()
        if self._error:
            raise RuntimeError("another thread failed") from self._error

    def done(self) -> None:
        """One tile needs it no more; after the last its memory is spare."""
        with self._lock:
            self._tiles -= 1
            if not self._tiles:
                self._spare.extend(self._memory)

    def _convert_share(self) -> None:
        with self._lock:
            if not self._memory:
                self.k, self.v = (self._allocate(source) for source in self._sources)
        while True:
            try:
                start = self._chunks.popleft()
            except IndexError:
                return
            chunk = slice(start, start + BLOCK_KEYS)
            for source, target in zip(self._sources, (self.k, self.v), strict=True):
                _convert(source[chunk], target[chunk, :-1])
                target[chunk, -1] = 1
            longest = _longest(self.k[chunk, :-1])
            finite = bool(np.isfinite(self.v[chunk]).all())
            with self._lock:
                self.longest = np.maximum(self.longest, longest)
                self.finite &= finite
                self._left -= 1
                if not self._left:
                    self._converted.set()

    def _allocate(self, source: Array) -> Floats:
        """Memory for `source` and a column more, used before if possible."""
        shape = (len(source), source.shape[1] + 1)
        size = shape[0] * shape[1]
        try:
            memory = self._spare.popleft()
        except IndexError:
            memory = np.empty(0, np.float32)
        if memory.size < size:
            memory = np.empty(size, np.float32)
        self._memory.append(memory)
        return memory[:size].reshape(shape)


@dataclass(frozen=True)
class _Tile:
    """The `tokens` and `heads` of a query against a panel of keys.

    Token ``i`` of the tile sees keys up to and with ``i + diagonal``, or all where that is None.
    """

    partial: Partial
    tokens: Span
    heads: slice
    panel: _Panel
    diagonal: int | None
    exp: Exp

    def __call__(self, poll: Poll) -> None:
        self.panel.convert()
        index = (self.tokens.slice, self.heads)
        rows = _Rows(self.partial, index, self.panel.longest, self.exp)
        for strip, keys in self._blocks(rows.group):
            rows.attend(strip, self.panel, keys, self._mask(strip.start // rows.group, keys))
            poll()
        rows.store(self.partial, index)
        self.panel.done()

    def _mask(self, token: int, keys: Span) -> int | None:
        """Which of `keys` is the last that `token` sees; None where it sees them all."""
        if self.diagonal is None or self.diagonal + token + 1 >= keys.stop:
            return None
        return self.diagonal + token - keys.start

    def _blocks(self, group: int) -> Iterator[tuple[Span, Span]]:
        """Rows and keys of each product; on the diagonal in strips, to compute less in vain."""
        rows = Span(0, len(self.tokens) * group)
        seen = len(self.panel) if self.diagonal is None else min(self.diagonal, len(self.panel))
        for start in range(0, seen, BLOCK_KEYS):
            yield rows, Span(start, min(start + BLOCK_KEYS, seen))
        if self.diagonal is None:
            return
        step = max(1, STRIP_ROWS // group)
        for start in range(0, len(self.tokens), step):
            stop = min(start + step, len(self.tokens))
            end = min(self.diagonal + stop, len(self.panel))
            if end > max(0, seen):
                yield Span(start * group, stop * group), Span(max(0, seen), end)


class _Rows:
    """The rows of a tile while it is computed: token-major, the heads of the group inside."""

    def __init__(
        self, partial: Partial, index: tuple[slice, slice], longest: np.float32, exp: Exp
    ) -> None:
        self.exp = exp
        q = partial.q[index]
        tokens, self.group, dim = q.shape
        rows = tokens * self.group
        self._load(partial, index, rows)
        self.q = _workspace.array("q", rows, dim + 1)
        self.q[:, -1] = 0
        _convert(q.reshape(rows, dim), self.q[:, :-1])
        self.q *= partial.scale  # whole rows: those that end in mid-vector take four times as long
        np.negative(self.reference, out=self.q[:, -1])
        # No score is larger than the lengths of query and key multiplied (Cauchy and Schwarz).
        bound = _longest(self.q) * longest
        self.tame = bool(bound <= HEADROOM) and not self.reference.any()
        self.fresh = not self.sums[:, -1].all()  # some row has seen nothing

    def _load(self, partial: Partial, index: tuple[slice, slice], rows: int) -> None:
        self.sums = _workspace.array("sums", rows, partial.sums.shape[2])
        self.reference = partial.reference[index].flatten()
        unstored = self.reference == -np.inf
        if unstored.all():
            self.sums.fill(0)
            self.reference.fill(0)
        else:
            self.sums.reshape(partial.sums[index].shape)[...] = partial.sums[index]
            self.sums[unstored] = 0
            self.reference[unstored] = 0

    def store(self, partial: Partial, index: tuple[slice, slice]) -> None:
        partial.sums[index] = self.sums.reshape(partial.sums[index].shape)
        partial.reference[index] = self.reference.reshape(partial.reference[index].shape)

    def attend(self, strip: Span, panel: _Panel, keys: Span, diagonal: int | None) -> None:
        """Add the attention of the rows in `strip` to `keys`, masked if `diagonal` is given.

        Token ``i`` of the strip sees keys up to and with ``i + diagonal``, counted in `keys`.
        """
        k, v = panel.k[keys.slice], panel.v[keys.slice]
        scores = _workspace.array("scores", len(strip), len(k))
        added = _workspace.array("added", len(strip), v.shape[1])
        used = slice(-1) if self.tame else slice(None)  # no reference, one column less
        np.matmul(self.q[strip.slice, used], k[:, used].T, out=scores)
        if diagonal is not None:
            cut = max(0, diagonal + 1)
            hidden = _hidden(len(strip), len(k) - cut, self.group, diagonal - cut)
            np.copyto(scores[:, cut:], -np.inf, where=hidden)
        if not (self.tame or self._in_reach(scores)):
            self._move_reference(strip, scores)
        self.exp(scores)
        if diagonal is None or panel.finite:
            np.matmul(scores, v, out=added)
        else:  # what a row must not see has weight 0, but 0 · NaN would be NaN
            _multiply_seen(scores, v, self.group, diagonal, out=added)
        self.sums[strip.slice] += added
        if self.fresh and not self.tame:
            self.fresh = not self.sums[:, -1].all()

    def _in_reach(self, scores: Floats) -> bool:
        """Whether exp can't overflow, nor vanish for all keys of a row that has no other yet.

        Two quick looks that nearly always suffice; False where they don't, or at a NaN.
        """
        if not scores.max() <= HEADROOM:
            return False
        return not self.fresh or bool(scores[:, :LOOK].max(axis=1).min() >= -HEADROOM)

    def _move_reference(self, strip: Span, scores: Floats) -> None:
        """Make the largest score of a row its reference, where that is out of reach."""
        sums = self.sums[strip.slice]
        new = sums[:, -1] == 0
        top = scores.max(axis=1)
        lowest = np.where(new, -HEADROOM, np.float32(-np.inf))
        moved = ~((top >= lowest) & (top <= HEADROOM)) & (top != -np.inf)
        by = np.where(moved, top, np.float32(0))
        scores -= by[:, None]
        sums *= np.where(new, np.float32(0), np.exp(-by))[:, None]
        self.reference[strip.slice] += by
        np.negative(self.reference, out=self.q[:, -1])


def _convert(source: Array, target: Floats) -> None:
    """Copy 16-bit numbers into float32.

    For float16 NumPy goes number by number; moving bits and setting the exponent right by one
    product takes less than half as long. That would make numbers of infinity and NaN.
    """
    if source.dtype != np.float16 or (source.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
        target[...] = source
        return
    bits = source.view(np.int16).astype(np.int32)
    bits <<= 13  # mantissas end 13 bits apart; the sign comes along three times too often
    bits &= ~0x7000_0000
    np.multiply(bits.view(np.float32), np.float32(2.0**112), out=target)  # exponents: 127 - 15


def _longest(vectors: Floats) -> np.float32:
    """Euclidean length of the longest row; NaN if there is one."""
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors).max())  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _hidden(rows: int, keys: int, group: int, diagonal: int) -> NDArray[np.bool_]:
    """Where a row of a strip must not look."""
    token = np.arange(rows)[:, None] // group
    return np.arange(keys) > token + diagonal


def _multiply_seen(scores: Floats, v: Floats, group: int, diagonal: int, out: Floats) -> None:
    """Multiply token by token, with the values that the token sees and no others."""
    for start in range(0, len(scores), group):
        rows, seen = slice(start, start + group), max(0, diagonal + 1 + start // group)
        np.matmul(scores[rows, :seen], v[:seen], out=out[rows])


class _Workspace(threading.local):
    """A thread's own memory for the tile that it computes, the same for every tile."""

    def __init__(self) -> None:
        self._buffers: dict[str, Floats] = {}

    def array(self, name: str, rows: int, columns: int) -> Floats:
        """An array with undefined contents, valid until the next of this name."""
        size = rows * columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, np.float32)
        return buffer[:size].reshape(rows, columns)


_workspace = _Workspace()


@dataclass(frozen=True)
class _Finish:
    """Divide the sums of some tokens by their weights; round once."""

    partial: Partial
    tokens: slice
    out: Array
    lse: Floats

    def __call__(self, poll: Poll) -> None:
        sums = self.partial.sums[self.tokens]
        total = sums[..., -1]
        quotient = sums[..., :-1] / total[..., None]
        reference = self.partial.reference[self.tokens]
        lse = np.log(total) + reference
        unseen = (reference == -np.inf) | (total == 0)
        if unseen.any():
            quotient[unseen] = 0
            lse[unseen] = -np.inf
        self.out[self.tokens] = quotient
        self.lse[self.tokens] = lse
        poll()
