"""Exact attention in NumPy: blocks that stay in cache, softmax on the fly, one task a tile.

The work is cut into tiles (some query tokens of one kv head, with all query heads that read it
stacked as rows, so that K and V are never copied per query head). A tile walks over the keys block
by block and keeps, in float32, the sum of ``exp(score - reference) · value``, the sum of
``exp(score - reference)`` and the reference, which follows the largest score (online softmax;
Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).

Tiles and blocks are cut by the shapes alone, so the bytes of a result don't depend on the number
of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.problem import Span

Array = NDArray[Any]
Floats = NDArray[np.float32]

TILE_ROWS = 256  # query tokens × query heads of one kv head
BLOCK_KEYS = 512


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
        self.values = np.zeros((tokens, heads, v_head_dim), np.float32)
        self.total = np.zeros((tokens, heads), np.float32)
        self.reference = np.full((tokens, heads), -np.inf, np.float32)

    def finish(self) -> tuple[Array, Floats]:
        """Output ``[Sq, Nq, Hv]`` in the dtype of the query, LSE ``[Sq, Nq]`` in float32."""
        with np.errstate(all="ignore"):
            seen = self.total != 0  # a NaN counts as seen
            lse = np.where(seen, self.reference + np.log(self.total), np.float32(-np.inf))
            weight = np.where(seen, 1 / self.total, np.float32(0))
            out = np.empty(self.values.shape, self.q.dtype)
            out[...] = self.values * weight[..., None]
        return out, lse


class BlockedAttention:
    """Runs tiles on `threads` threads, the caller's own among them.

    `poll` is called between blocks, by the caller's thread alone: whatever must be kept going
    while the rank computes.
    """

    def __init__(self, threads: int, poll: Callable[[], None]) -> None:
        self._poll = poll
        self._helpers = threads - 1
        self._pool = ThreadPoolExecutor(self._helpers, "attention") if self._helpers else None

    def attend(self, partial: Partial, rows: Span, k: Array, v: Array, causal: bool) -> None:
        """Add the attention of the query's `rows` to all of `k` and `v`.

        `k` is ``[Skv, Nkv, H]``, `v` ``[Skv, Nkv, Hv]``. `causal` means ``lower_right``.
        """
        if not len(rows) or not len(k):
            return
        tasks = deque(self._tiles(partial, rows, k, v, causal))
        helpers = (
            [self._pool.submit(_drain, tasks, _nothing) for _ in range(self._helpers)]
            if (self._pool)
            else []
        )
        _drain(tasks, self._poll)
        for helper in helpers:
            helper.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()

    def _tiles(
        self, partial: Partial, rows: Span, k: Array, v: Array, causal: bool
    ) -> Iterator[Callable[[Callable[[], None]], None]]:
        group = partial.q.shape[1] // k.shape[1]
        step = max(1, TILE_ROWS // group)
        for kv_head in range(k.shape[1]):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            for start in range(rows.start, rows.stop, step):
                tokens = slice(start, min(start + step, rows.stop))
                # The first row of the tile sees keys up to and with this one.
                diagonal = start - rows.start + len(k) - len(rows) if causal else None
                yield _Tile(partial, tokens, heads, k[:, kv_head], v[:, kv_head], diagonal)


class _Tile:
    def __init__(
        self,
        partial: Partial,
        tokens: slice,
        heads: slice,
        k: Array,
        v: Array,
        diagonal: int | None,
    ) -> None:
        self.partial = partial
        self.index = (tokens, heads)
        self.k, self.v = k, v
        self.diagonal = diagonal

    def __call__(self, poll: Callable[[], None]) -> None:
        partial = self.partial
        q = partial.q[self.index].astype(np.float32) * partial.scale
        count, group, dim = q.shape
        q = q.reshape(-1, dim)
        values = partial.values[self.index].reshape(count * group, -1)
        total = partial.total[self.index].reshape(-1)
        reference = partial.reference[self.index].reshape(-1)
        visible = len(self.k) if self.diagonal is None else self.diagonal + count
        for start in range(0, visible, BLOCK_KEYS):
            keys = slice(start, min(start + BLOCK_KEYS, visible))
            scores = q @ self.k[keys].astype(np.float32).T
            if self.diagonal is not None and keys.stop > self.diagonal + 1:
                limit = np.repeat(np.arange(count), group) + self.diagonal
                np.copyto(scores, -np.inf, where=np.arange(start, keys.stop) > limit[:, None])
            top = np.maximum(reference, scores.max(axis=1))
            safe = np.where(top == -np.inf, np.float32(0), top)
            weight = np.exp(reference - safe)
            np.exp(scores - safe[:, None], out=scores)
            total = total * weight + scores.sum(axis=1)
            values = values * weight[:, None] + scores @ self.v[keys].astype(np.float32)
            reference = top
            poll()
        partial.values[self.index] = values.reshape(count, group, -1)
        partial.total[self.index] = total.reshape(count, group)
        partial.reference[self.index] = reference.reshape(count, group)


def _drain(tasks: deque[Callable[[Callable[[], None]], None]], poll: Callable[[], None]) -> None:
    with np.errstate(all="ignore"):
        while True:
            try:
                task = tasks.popleft()
            except IndexError:
                return
            task(poll)


def _nothing() -> None:
    pass
