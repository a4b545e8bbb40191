"""One tile: some rows of the query against the keys and values of one kv head.

What makes it fast is leaving passes over the scores to the matrix products:

- a column of ones in V makes the product with V return the row sums as well;
- a column ``-reference`` in Q against ones in K makes the product with K return scores that have
  the reference subtracted;
- the reference need not be the largest score, only within `HEADROOM` of it: a block whose scores
  stay in reach (nearly all do) is neither searched row by row nor rescaled, and not even searched
  where queries and keys are too short for large scores.

What is left is one product, a maximum at most, one exp in place, one product.

All of this is float32, as long as bounds that cost next to nothing say that float32 holds it: the
lengths of queries and keys (no score is larger than their product, by Cauchy and Schwarz), and the
exponents of the values. From the first block on for which they don't, a tile is computed in
float64, which holds whatever sums and products of 16-bit numbers and a float32 scale there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mdattn_mpi.devices.cpu.partial import Array, Floats, Partial
from mdattn_mpi.mask import Span

Wide = np.ndarray[Any, np.dtype[np.floating[Any]]]  # float32 or float64
Poll = Callable[[], None]
Exp = Callable[[Any], Any]

BLOCK_KEYS = 512
STRIP_ROWS = 128  # on the diagonal of a causal mask: half a square of this is computed in vain
HEADROOM = 24.0  # exp(24) · 1M keys is far from the end of float32
LOOK = 4  # keys

# Where float32 ends. A score's error is some 2⁻²⁴ of the bound on it, and a relative one of its
# weight: at this bound, a quarter of what rounding the output to float16 does.
SCORE_BOUND = 2.0**10
CAPPED_BOUND = SCORE_BOUND / 4  # a quotient, tanh and a product: three roundings more
# Patterns of finite values, the sign and 0 left out, of which weighted sums neither overflow nor
# lose bits, though the weights of a row may all be as small as exp(-24).
VALUES = {
    np.dtype(ml_dtypes.bfloat16): range(0x1780, 0x5F81),  # 2⁻⁸⁰ to 2⁶⁴
    np.dtype(np.float16): range(0x0001, 0x7C00),  # all
    np.dtype(np.float32): range(0x1780_0000, 0x5F80_0001),  # as bfloat16's: a model's own arrays
}
INFINITY = {
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F80_0000,
}
UNSIGNED = np.uint16(0x7FFF)
UNDERFLOW = np.float32(2.0**-110)  # above what squares of 256 numbers lose where they are tiny


class Sight(NamedTuple):
    """Token ``i`` sees the keys from ``i + low`` to ``i + high``, both counted in some block."""

    low: int
    high: int

    def shift(self, by: int) -> Sight:
        """Say the same of a block where tokens begin later, or keys earlier, by so many."""
        return Sight(self.low + by, self.high + by)

    def seen(self, tokens: int, keys: int) -> Span:
        """Return the keys of a block that any of its tokens sees."""
        return Span(0, keys).meet(Span(self.low, self.high + tokens))

    def seen_by_all(self, tokens: int, keys: int) -> Span:
        """Return the keys of a block that all of its tokens see; empty where there are none."""
        return self.seen(tokens, keys).meet(Span(self.low + tokens - 1, self.high + 1))


@dataclass(frozen=True)
class Tile:
    """The `tokens` and `heads` of a query against the keys and values of one kv head."""

    partial: Partial
    tokens: Span
    heads: slice
    k: Array
    v: Array
    sight: Sight
    exp: Exp

    def __call__(self, poll: Poll) -> None:
        """Add what these rows see to the partial result."""
        rows = _Rows(self.partial, (self.tokens.slice, self.heads), self.exp)
        seen = self.sight.seen(len(self.tokens), len(self.k))
        for start in range(seen.start, seen.stop, BLOCK_KEYS):
            keys = Span(start, min(start + BLOCK_KEYS, seen.stop))
            block = _Block(self.k[keys.slice], self.v[keys.slice])
            rows.prepare(block)
            for tokens in self._strips(keys):
                rows.attend(tokens, block, self.sight.shift(tokens.start - start))
                poll()
        rows.store()

    def _strips(self, keys: Span) -> Iterator[Span]:
        """Cut the tokens that see any of `keys`; finely where they don't see all."""
        low, high = self.sight
        every = Span(0, len(self.tokens)).meet(Span(keys.start - high, keys.stop - low))
        all_seen = every.meet(Span(keys.stop - 1 - high, keys.start + 1 - low))
        step = max(1, STRIP_ROWS // self.group)
        parts = [every]
        if len(all_seen):
            yield all_seen
            parts = [Span(every.start, all_seen.start), Span(all_seen.stop, every.stop)]
        for part in parts:
            for start in range(part.start, part.stop, step):
                yield Span(start, min(start + step, part.stop))

    @property
    def group(self) -> int:
        """Query heads: each is a row of a token."""
        return len(range(self.heads.start, self.heads.stop))


class _Block:
    """Keys and values of one head in float32, each row with a 1 at its end."""

    def __init__(self, k: Array, v: Array) -> None:
        self.k, self.v = (self._load(name, source) for name, source in (("k", k), ("v", v)))
        self.longest = _longest(self.k[:, :-1])
        bits = np.dtype(f"u{v.itemsize}")
        magnitudes = v.view(bits) & bits.type((1 << 8 * v.itemsize - 1) - 1)
        largest = magnitudes.max()
        magnitudes -= bits.type(1)  # 0 becomes the greatest: it is as good as any
        usual = VALUES[v.dtype]
        self.usual = largest < usual.stop and int(magnitudes.min()) + 1 >= usual.start
        self.finite = largest < INFINITY[v.dtype]

    @staticmethod
    def _load(name: str, source: Array) -> Floats:
        target: Floats = _workspace.array(name, len(source), source.shape[1] + 1)
        _convert(source, target[:, :-1])
        target[:, -1] = 1
        return target


class _Rows:
    """The rows of a tile while it is computed: token-major, the heads of the group inside."""

    def __init__(self, partial: Partial, index: tuple[slice, slice], exp: Exp) -> None:
        self.partial, self.index = partial, index
        self.group = index[1].stop - index[1].start
        self.exp = exp
        self.wide = bool(partial.wide[index].any())
        self._load()
        self.longest = _longest(self.q[:, :-1])

    def _load(self) -> None:
        """Take queries, scaled, and what the rows have seen, in float32 or in float64."""
        partial, dtype = self.partial, np.float64 if self.wide else np.float32
        q = partial.q[self.index]
        rows, dim = len(q) * self.group, q.shape[2]
        self.q = _workspace.array("q", rows, dim + 1, dtype)
        self.q[:, -1] = 0
        _convert(q.reshape(rows, dim), self.q[:, :-1])
        self.q *= dtype(partial.scale)  # whole rows: such as end in mid-vector take 4 × as long
        self.sums = _workspace.array("sums", rows, partial.output.shape[2] + 1, dtype)
        self.reference = partial.reference[self.index].astype(dtype).reshape(rows)
        unstored = self.reference == -np.inf
        if unstored.all():
            self.sums.fill(0)
        else:
            weight = partial.weight[self.index].astype(dtype)
            sums = self.sums.reshape(*weight.shape, -1)
            np.multiply(partial.output[self.index], weight[..., None], out=sums[..., :-1])
            sums[..., -1] = weight
            self.sums[unstored] = 0
        self.reference[unstored] = 0
        np.negative(self.reference, out=self.q[:, -1])
        self.moved = bool(self.reference.any())
        self.fresh = not self.sums[:, -1].all()  # some row has seen nothing

    def store(self) -> None:
        """Give back what the rows have seen."""
        partial, index = self.partial, self.index
        sums = self.sums.reshape(*partial.weight[index].shape, -1)
        weight = sums[..., -1]
        partial.weight[index] = weight
        partial.reference[index] = self.reference.reshape(weight.shape)
        partial.wide[index] = self.wide
        divisor = np.where(weight == 0, 1, weight)[..., None]
        np.divide(sums[..., :-1], divisor, out=partial.output[index], casting="same_kind")

    def prepare(self, block: _Block) -> None:
        """Find out what computing with `block` takes; go over to float64 if it takes that."""
        bound = self.longest * block.longest
        narrow = bound <= SCORE_BOUND
        if softcap := self.partial.softcap:
            bound = np.minimum(bound, softcap)
            narrow = narrow and bound <= CAPPED_BOUND
        if not (self.wide or (narrow and block.usual)):
            self.store()
            self.wide = True
            self._load()
        if self.wide:
            block.k, block.v = block.k.astype(np.float64), block.v.astype(np.float64)
        self.bounded = bool(bound <= HEADROOM) and not (self.moved or self.wide)

    def attend(self, tokens: Span, block: _Block, sight: Sight) -> None:
        """Add the attention of the rows of `tokens` to the keys of `block` that they see."""
        strip = slice(tokens.start * self.group, tokens.stop * self.group)
        seen = sight.seen(len(tokens), len(block.k))
        k, v, sums = block.k[seen.slice], block.v[seen.slice], self.sums[strip]
        sight = sight.shift(-seen.start)
        shown = sight.seen_by_all(len(tokens), len(k))
        scores = self._scores(strip, k)
        for part in (Span(0, shown.start), Span(shown.stop, len(k))):
            if len(part):
                hidden = _hidden(len(scores), len(part), self.group, sight.shift(-part.start))
                np.copyto(scores[:, part.slice], -np.inf, where=hidden)
        if not (self.bounded or self._in_reach(scores, shown)):
            self._move_reference(strip, scores)
        if self.wide:
            np.exp(scores, out=scores)
        else:
            self.exp(scores)
        added = _workspace.array("added", len(sums), sums.shape[1], sums.dtype)
        if len(shown) == len(k) or block.finite:
            np.matmul(scores, v, out=added)
        else:  # what a row must not see has weight 0, but 0 · NaN would be NaN
            _multiply_seen(scores, v, self.group, sight, out=added)
        sums += added
        if self.fresh and not self.bounded:
            self.fresh = not self.sums[:, -1].all()

    def _scores(self, strip: slice, k: Wide) -> Wide:
        """Scores with their row's reference subtracted."""
        scores: Wide = _workspace.array("scores", strip.stop - strip.start, len(k), k.dtype)
        if self.wide:  # equal scores must stay equal, however large: no sum with the reference
            np.matmul(self.q[strip, :-1], k[:, :-1].T, out=scores)
            self._cap(scores)
            scores -= self.reference[strip, None]
        elif self.partial.softcap:
            np.matmul(self.q[strip, :-1], k[:, :-1].T, out=scores)
            self._cap(scores)
            if self.moved:
                scores -= self.reference[strip, None]
        else:
            used = slice(-1) if self.bounded else slice(None)  # no reference, one column less
            np.matmul(self.q[strip, used], k[:, used].T, out=scores)
        return scores

    def _cap(self, scores: Wide) -> None:
        """Cap scores; quotients, so that neither a tiny nor a huge cap makes 0 · ∞."""
        softcap = scores.dtype.type(self.partial.softcap)
        if softcap:
            scores /= softcap
            np.tanh(scores, out=scores)
            scores *= softcap

    def _in_reach(self, scores: Wide, shown: Span) -> bool:
        """Whether exp can't overflow, nor vanish for all keys of a row that has no other yet.

        Two quick looks that nearly always suffice; False where they don't, or at a NaN. `shown` are
        the keys that no row must not see: some of them are looked at, all where there are none.
        """
        if not scores.max() <= HEADROOM:
            return False
        looked_at = scores[:, shown.start : shown.start + LOOK] if len(shown) else scores
        return not self.fresh or bool(looked_at.max(axis=1).min() >= -HEADROOM)

    def _move_reference(self, strip: slice, scores: Wide) -> None:
        """Make the largest score of a row its reference, where that is out of reach."""
        sums, zero = self.sums[strip], scores.dtype.type(0)
        new = sums[:, -1] == 0
        top = scores.max(axis=1)
        lowest = np.where(new, -HEADROOM, -np.inf)
        outside = ~((top >= lowest) & (top <= HEADROOM)) & (top != -np.inf)
        by = np.where(outside, top, zero)
        scores -= by[:, None]
        sums *= np.where(new, zero, np.exp(-by))[:, None]
        self.reference[strip] += by
        self.moved = True
        np.negative(self.reference, out=self.q[:, -1])


def _convert(source: Array, target: Wide) -> None:
    """Copy 16-bit numbers into wider ones.

    For float16 NumPy goes number by number; moving bits and setting the exponent right by one
    product takes less than half as long. That would make numbers of infinity and NaN.
    """
    if source.dtype != np.float16 or (source.view(np.uint16) & UNSIGNED).max() >= 0x7C00:
        target[...] = source
        return
    bits = source.view(np.int16).astype(np.int32)
    bits <<= 13  # mantissas end 13 bits apart; the sign comes along three times too often
    bits &= ~0x7000_0000
    np.multiply(bits.view(np.float32), np.float32(2.0**112), out=target)  # exponents: 127 - 15


def _longest(vectors: Wide) -> np.floating[Any]:
    """Euclidean length of the longest row, or a little more; NaN if there is one."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    return np.sqrt(squares.max() + UNDERFLOW)  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _hidden(rows: int, keys: int, group: int, sight: Sight) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where a row of a strip must not look."""
    after = np.arange(keys) - np.arange(rows)[:, None] // group
    return (after < sight.low) | (after > sight.high)


def _multiply_seen(scores: Wide, v: Wide, group: int, sight: Sight, out: Wide) -> None:
    """Multiply token by token, with the values that the token sees and no others."""
    for start in range(0, len(scores), group):
        rows, seen = slice(start, start + group), sight.shift(start // group).seen(1, len(v)).slice
        np.matmul(scores[rows, seen], v[seen], out=out[rows])


class _Workspace(threading.local):
    """A thread's own memory for the tile that it computes, the same for every tile."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, np.dtype[Any]], Wide] = {}

    def array(self, name: str, rows: int, columns: int, dtype: Any = np.float32) -> Any:
        """An array with undefined contents, valid until the next of this name and dtype."""
        key, size = (name, np.dtype(dtype)), rows * columns
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[key] = np.empty(size, dtype)
        return buffer[:size].reshape(rows, columns)


_workspace = _Workspace()
