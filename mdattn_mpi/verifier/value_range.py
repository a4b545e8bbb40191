"""Looking at every number of an output: is it finite, and between the values that its row sees?

A softmax weighs values, so each output lies between the smallest and the largest of them, dim by
dim. Rounding keeps it there, for the two are numbers of the same dtype; weights that were rounded
to 16 bits can move it by one number more. A sink takes weight without a value, so that 0 is as good
as a value. A row that sees no key is 0. Where rows don't see all keys before their last, because of
a window or documents, the values of up to two groups of keys more are let pass.

All of this compares 16-bit patterns as integers, at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.verifier.visible import visible

Array = NDArray[Any]
Keys = NDArray[np.int16]

LARGEST = {"bfloat16": 0x7F7F, "float16": 0x7BFF}  # finite
LEAST, MOST = -0x8000, 0x7FFF  # of all keys
GROUP = 64  # tokens between two notes of the smallest and largest values so far
PIECE = 1 << 17  # numbers that stay in cache while they are looked at


def ordered(array: Array) -> Keys:
    """Return integers in the order of the 16-bit numbers of `array`; neighbours differ by 1."""
    bits = array.view(np.int16)
    keys = bits >> 15
    keys &= 0x7FFF
    keys ^= bits  # the greater a negative pattern, the smaller the number
    return keys


class Bounds(NamedTuple):
    """Smallest and largest key: of values that were seen, or that an output may have."""

    low: Keys
    high: Keys

    def with_all(self, keys: Keys) -> Bounds:
        """Take in keys, ``[tokens, …]``."""
        return Bounds(
            np.minimum(self.low, keys.min(axis=0)), np.maximum(self.high, keys.max(axis=0))
        )

    def with_each(self, keys: Keys) -> Bounds:
        """Take in keys one after the other: ``[tokens, …]``, after each of them."""
        return Bounds(_running(np.minimum, self.low, keys), _running(np.maximum, self.high, keys))

    def of_output(self, dtype: str) -> Bounds:
        """Allow one number more, but none that isn't finite; anything where a value isn't."""
        least, most = -LARGEST[dtype] - 1, LARGEST[dtype]
        anything = (self.low < least) | (self.high > most)
        low = np.where(anything, LEAST, np.maximum(self.low, least + 1) - 1)
        high = np.where(anything, MOST, np.minimum(self.high, most - 1) + 1)
        return Bounds(low.astype(np.int16), high.astype(np.int16))

    def outside(self, keys: Keys) -> NDArray[np.bool_]:
        """Say which keys aren't within these bounds."""
        return (keys < self.low) | (keys > self.high)


class ValueRange:
    """The values of one item, as bounds of its output."""

    def __init__(self, problem: AttentionProblem, read: Callable[[Span], Array]) -> None:
        self._problem = problem
        self._read = read
        shape = (problem.kv_heads, problem.v_head_dim)
        seen = Bounds(np.full(shape, MOST, np.int16), np.full(shape, LEAST, np.int16))
        self._before = [seen]  # of all tokens before each group, and of all at last
        self._groups: list[Bounds] = []  # of each group by itself, where rows don't see all before
        none = seen
        self._far = problem.window[0] >= 0 or bool(problem.segments)
        groups = max(1, PIECE // (GROUP * shape[0] * shape[1]))
        for span in _cut(Span(0, problem.kv_tokens), groups * GROUP):
            keys = ordered(read(span))
            for group in _cut(Span(0, len(span)), GROUP):
                if self._far:
                    self._groups.append(none.with_all(keys[group.slice]))
                else:
                    seen = seen.with_all(keys[group.slice])
                    self._before.append(seen)

    def outside(self, rows: Span, output: Array) -> NDArray[np.bool_]:
        """Say which rows and heads of ``[R, Nq, Hv]`` have a number out of bounds: ``[R, Nq]``."""
        problem = self._problem
        found = np.zeros(output.shape[:2], bool)
        step = max(1, PIECE // (problem.q_heads * problem.v_head_dim))
        for piece in _cut(rows, min(step, GROUP) if self._far else step):
            part = piece.shift(-rows.start).slice
            self._look(piece, output[part], found[part])
        return found

    def _look(self, rows: Span, output: Array, found: NDArray[np.bool_]) -> None:
        problem = self._problem
        keys = ordered(output).reshape(len(rows), problem.kv_heads, -1, problem.v_head_dim)
        seen = visible(problem, np.arange(rows.start, rows.stop))
        blind = ~seen.any
        found[blind] = (output[blind].view(np.uint16) & 0x7FFF).any(axis=2)
        seeing = np.flatnonzero(seen.any)
        if not len(seeing):
            return
        rest = slice(int(seeing[0]), int(seeing[-1]) + 1)  # in order: no other is in between
        first, last = seen.first[rest], seen.last[rest]
        if self._far:
            groups = self._groups[int(first[0]) // GROUP : int(last[-1]) // GROUP + 1]
            low, high = zip(*groups, strict=True)
            self._mark(found[rest], keys[rest], Bounds(np.min(low, axis=0), np.max(high, axis=0)))
        elif last[0] == problem.kv_tokens - 1:
            self._mark(found[rest], keys[rest], self._before[-1])
        else:
            self._mark_prefixes(found[rest], keys[rest], last)

    def _mark(self, found: NDArray[np.bool_], keys: Keys, values: Bounds) -> None:
        """Note which rows and heads are outside; `keys` is ``[R, Nkv, Nq / Nkv, Hv]``."""
        allowed = self._allowed(values)
        outside = Bounds(allowed.low[:, None], allowed.high[:, None]).outside(keys)
        if outside.any():
            found |= outside.any(axis=3).reshape(found.shape)

    def _allowed(self, values: Bounds) -> Bounds:
        """Return the bounds of an output, whose row sees `values`."""
        if self._problem.sinks:  # the key of the number 0 is 0
            values = Bounds(np.minimum(values.low, 0), np.maximum(values.high, 0))
        return values.of_output(self._problem.dtype)

    def _mark_prefixes(self, found: NDArray[np.bool_], keys: Keys, last_seen: Array) -> None:
        """Do the same where each row sees values up to a token of its own, those in order.

        Most columns have had their extremes before, and the others are looked at row by row.
        """
        first = int(last_seen[0]) // GROUP
        before, start = self._before[first], first * GROUP
        values = ordered(self._read(Span(start, int(last_seen[-1]) + 1)))
        after = before.with_all(values)
        self._mark(found, keys, after)
        head, dim = np.nonzero((before.low != after.low) | (before.high != after.high))
        seen = Bounds(before.low[head, dim], before.high[head, dim]).with_each(values[:, head, dim])
        each = self._allowed(Bounds(*(side[last_seen - start] for side in seen)))
        columns = keys.swapaxes(1, 2)[:, :, head, dim]  # [R, Nq / Nkv, columns]
        outside = Bounds(each.low[:, None], each.high[:, None]).outside(columns)
        if outside.any():
            row, member, column = np.nonzero(outside)
            found[row, head[column] * keys.shape[2] + member] = True


def _cut(span: Span, step: int) -> Iterator[Span]:
    for start in range(span.start, span.stop, step):
        yield Span(start, min(start + step, span.stop))


def _running(extreme: np.ufunc, before: Keys, keys: Keys) -> Keys:
    """Return the extreme of `before` and all keys up to each token; `accumulate` is far slower."""
    found = extreme(keys, before)
    step = 1
    while step < len(found):
        found[step:] = extreme(found[step:], found[:-step])
        step *= 2
    return found  # type: ignore[no-any-return]
