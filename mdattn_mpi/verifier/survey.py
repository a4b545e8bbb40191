"""Every byte and every number of one item's output, each read once: checksums, and bounds."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.problem import Span
from mdattn_mpi.verifier.compare import Array, Place, Source
from mdattn_mpi.verifier.value_range import ValueRange
from mdattn_mpi.verifier.visible import visible

Flags = NDArray[np.bool_]

READ_BYTES = 8 << 20
READ_TOKENS = 4096


@dataclass(frozen=True)
class Impossible:
    """Rows × heads of which a number can't be right, whatever the scores; the first of them."""

    count: int = 0
    first: Place | None = None

    def __add__(self, other: Impossible) -> Impossible:
        found = [place for place in (self.first, other.first) if place]
        first = min(found, key=lambda place: (place.row, place.head), default=None)
        return Impossible(self.count + other.count, first)


@dataclass(frozen=True)
class Survey:
    """What all shards of an item came to."""

    crc32s: tuple[int, ...]
    outputs: Impossible  # not finite, or outside what its values allow
    lses: Impossible  # not finite, or not −∞ where no key is seen

    @property
    def impossible(self) -> int:
        """Rows × heads of either."""
        return self.outputs.count + self.lses.count


def survey(source: Source, shards: Sequence[Sequence[Span]]) -> Survey:
    """Look at the output and LSE of the query tokens that each rank wrote.

    Rows that see an input which isn't finite may hold anything.
    """
    surveyor = _Surveyor(source)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "survey") as pool:
        found = list(pool.map(surveyor.shard, shards))
    crc32s, outputs, lses = zip(*found, strict=True)
    return Survey(crc32s, sum(outputs, Impossible()), sum(lses, Impossible()))


class _Surveyor:
    """One item."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._problem = source.problem
        self._values = ValueRange(source.problem, lambda span: source.read_input("value", (span,)))

    def shard(self, spans: Sequence[Span]) -> tuple[int, Impossible, Impossible]:
        """CRC-32 over the output of `spans`, then over their LSE; what is impossible in each."""
        crc32, outputs, lses = 0, Impossible(), Impossible()
        for rows in self._runs(spans):
            output = self._source.read_output("output", (rows,))
            crc32 = zlib.crc32(_bytes(output), crc32)
            outputs += self._impossible(rows, self._values.outside(rows, output))
        for rows in self._runs(spans) if self._source.lse else ():
            lse = self._source.read_output("lse", (rows,))
            crc32 = zlib.crc32(_bytes(lse), crc32)
            seeing = visible(self._problem, _tokens(rows)).any[:, None] | self._takes_weight
            wrong = np.where(seeing, ~np.isfinite(lse), ~np.isneginf(lse))
            lses += self._impossible(rows, wrong)
        return crc32, outputs, lses

    def _runs(self, spans: Sequence[Span]) -> Iterator[Span]:
        token_bytes = 2 * self._problem.q_heads * self._problem.v_head_dim
        step = max(1, READ_BYTES // token_bytes)
        for span in spans:
            for start in range(span.start, span.stop, step):
                yield Span(start, min(start + step, span.stop))

    def _impossible(self, rows: Span, flags: Flags) -> Impossible:
        """Count what is flagged, but for rows that see an input which isn't finite."""
        if not flags.any():
            return Impossible()
        query = self._source.read_input("query", (rows,))
        first, last = visible(self._problem, _tokens(rows))
        stop = np.maximum(last + 1, first.clip(max=self._problem.kv_tokens))
        bad = self._nonfinite[stop] > self._nonfinite[first.clip(max=self._problem.kv_tokens)]
        flags = flags & np.isfinite(query).all(axis=2) & ~bad & ~self._bad_sinks
        if not flags.any():
            return Impossible()
        row, head = np.unravel_index(int(flags.argmax()), flags.shape)
        return Impossible(int(flags.sum()), Place(rows.start + int(row), int(head)))

    @cached_property
    def _nonfinite(self) -> Array:
        """``[Skv + 1, Nq]``: how many tokens before each have a key or value that isn't finite."""
        problem = self._problem
        bad = np.zeros((problem.kv_tokens + 1, problem.kv_heads), bool)
        for start in range(0, problem.kv_tokens, READ_TOKENS):
            span = Span(start, min(start + READ_TOKENS, problem.kv_tokens))
            for tensor in ("key", "value"):
                numbers = self._source.read_input(tensor, (span,))
                bad[span.shift(1).slice] |= ~np.isfinite(numbers).all(axis=2)
        return np.repeat(bad.cumsum(axis=0, dtype=np.int32), problem.group_heads, axis=1)

    @cached_property
    def _sinks(self) -> Array:
        """``[Nq]``: −∞ where there are none."""
        if self._problem.sinks:
            return self._source.read_input("sinks", ())
        return np.full(self._problem.q_heads, -np.inf)

    @property
    def _takes_weight(self) -> Flags:
        return ~np.isneginf(self._sinks)

    @property
    def _bad_sinks(self) -> Flags:
        return ~np.isfinite(self._sinks) & self._takes_weight


def _tokens(rows: Span) -> Array:
    return np.arange(rows.start, rows.stop)


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
