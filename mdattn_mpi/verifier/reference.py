"""Attention in float64, block by block, written for plainness: what every output is judged by.

Beside the output it measures how large the sums were that led to it, since these decide how much of
a difference honest rounding can make (see `tolerance`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.verifier.visible import Visible, visible

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Read = Callable[[str, Span], Array]

MAX_BLOCK = 1024  # keys at a time


@dataclass(frozen=True)
class Reference:
    """The attention of ``R`` query rows, and the size of what was summed.

    With ``p`` the softmax weights of a row and head:

    ===========  ============  =======================================================
    output       [R, Nq, Hv]   Σ p v
    lse          [R, Nq]       natural log of Σ exp(score), sinks included; −∞ if of nothing
    spread       [R, Nq, Hv]   √(Σ p² v²), what independent errors of the weights scale
    peak         [R, Nq, Hv]   the largest |Σ p v| over the first so many blocks of keys
    score_bound  [R, Nq]       no |score| is above it, nor any sum on the way to one
    finite       [R, Nq]       False where a query, key or value that is seen is not finite
    ===========  ============  =======================================================
    """

    output: Doubles
    lse: Doubles
    spread: Doubles
    peak: Doubles
    score_bound: Doubles
    finite: NDArray[np.bool_]


def reference(
    problem: AttentionProblem, rows: Array, query: Array, read: Read, sinks: Array | None = None
) -> Reference:
    """Attend from the query tokens `rows` to all keys that they see.

    Parameters
    ----------
    problem
        Shapes, mask and scale.
    rows
        ``[R]``, ascending positions in the sequence.
    query
        ``[R, Nq, H]``, the queries at `rows`.
    read
        ``read("key", span)`` gives ``[tokens, Nkv, H]``; ``"value"`` likewise. Each token is read
        once; no more than `MAX_BLOCK` at a time.
    sinks
        ``[Nq]``: a score a head without a value.

    """
    seen = visible(problem, rows)
    scores = np.full(problem.q_heads, -np.inf) if sinks is None else sinks.astype(np.float64)
    heads = [
        _Head(problem, seen, *parts)
        for parts in zip(
            np.split(query, problem.kv_heads, axis=1),
            np.split(scores, problem.kv_heads),
            strict=True,
        )
    ]
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, len(heads))
    with (
        threadpool_limits(cores // workers, user_api="blas"),
        ThreadPoolExecutor(workers, "reference") as pool,
    ):
        for span in _blocks(problem, seen):
            k, v = read("key", span), read("value", span)
            found = [
                pool.submit(head.add, span.start, k[:, number], v[:, number])
                for number, head in enumerate(heads)
            ]
            for future in found:
                future.result()
    results = [head.results() for head in heads]
    return Reference(*(np.concatenate(parts, axis=1) for parts in zip(*results, strict=True)))


def _blocks(problem: AttentionProblem, seen: Visible) -> Iterator[Span]:
    """Cut the keys that any row sees; even a short sequence into several blocks."""
    step = max(1, min(MAX_BLOCK, problem.kv_tokens // 16))
    stop = int(seen.last[-1]) + 1
    for start in range(int(seen.first[0]), stop, step):
        block = Span(start, min(start + step, stop))
        if len(range(*_seeing(seen, block).indices(len(seen.first)))):
            yield block


def _seeing(seen: Visible, keys: Span) -> slice:
    """Return the rows, which are in order, that see any of `keys`."""
    start = np.searchsorted(seen.last, keys.start)
    return slice(int(start), int(np.searchsorted(seen.first, keys.stop)))


class _Head:
    """One kv head and the query heads that read it, stacked as rows (online softmax)."""

    def __init__(
        self, problem: AttentionProblem, seen: Visible, query: Array, sinks: Doubles
    ) -> None:
        self.shape = query.shape[:2]
        self.finite = np.isfinite(query).all(axis=2).reshape(-1)
        self.q = np.nan_to_num(query.astype(np.float64), posinf=0, neginf=0)
        self.q = self.q.reshape(-1, problem.head_dim) * problem.scale
        self.softcap = problem.softcap
        self.seen = Visible(*(np.repeat(end, query.shape[1]) for end in seen))
        count = len(self.q)
        self.top = np.tile(sinks, len(query))  # the first thing that takes weight
        self.finite &= np.isfinite(self.top) | np.isneginf(self.top)
        self.total = np.where(np.isneginf(self.top), 0.0, 1.0)
        self.key_norm = np.zeros(count)
        self.values, self.squares, self.peak = (
            np.zeros((count, problem.v_head_dim)) for _ in range(3)
        )

    def add(self, start: int, key: Array, value: Array) -> None:
        """Attend to the keys from token `start` on: ``[tokens, H]`` and ``[tokens, Hv]``."""
        some = _seeing(self.seen, Span(start, start + len(key)))
        keys = start + np.arange(len(key))
        seen = (keys >= self.seen.first[some, None]) & (keys <= self.seen.last[some, None])
        k, v = self._without_bad(seen, some, key.astype(np.float64), value.astype(np.float64))

        scores = self.q[some] @ k.T
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        scores[~seen] = -np.inf
        top = np.maximum(self.top[some], scores.max(axis=1, initial=-np.inf))
        shrink = np.exp(self.top[some] - top)[:, None]
        weights = np.exp(scores - top[:, None])

        self.top[some] = top
        self.total[some] = self.total[some] * shrink[:, 0] + weights.sum(axis=1)
        self.values[some] = self.values[some] * shrink + weights @ v
        self.squares[some] = self.squares[some] * shrink**2 + weights**2 @ v**2
        self.peak[some] = np.maximum(self.peak[some] * shrink, abs(self.values[some]))
        norm = np.sqrt((k**2).sum(axis=1).max(initial=0))
        self.key_norm[some] = np.maximum(self.key_norm[some], norm)

    def _without_bad(self, seen: Array, some: slice, k: Doubles, v: Doubles) -> tuple[Doubles, ...]:
        """Put 0 for keys and values that aren't finite; note which rows see them."""
        bad = ~(np.isfinite(k).all(axis=1) & np.isfinite(v).all(axis=1))
        if bad.any():
            self.finite[some] &= ~(seen & bad).any(axis=1)
            k[bad], v[bad] = 0, 0
        return k, v

    def results(self) -> tuple[Array, ...]:
        """In the order of `Reference`; rows that saw nothing give 0 and −∞."""
        seen = self.total > 0
        total = np.where(seen, self.total, 1)[:, None]
        lse = np.where(seen, self.top + np.log(total[:, 0]), -np.inf)
        bound = np.linalg.norm(self.q, axis=1) * self.key_norm
        fields = (
            self.values / total,
            lse,
            np.sqrt(self.squares) / total,
            self.peak / total,
            bound,
            self.finite,
        )
        return tuple(field.reshape(*self.shape, *field.shape[1:]) for field in fields)
