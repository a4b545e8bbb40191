"""NaN and infinity in the shards of an item, found on 16-bit patterns without any arithmetic.

A softmax weighs values, so each output lies between the smallest and the largest of them: of a
finite input every output is finite. Where a backend's arithmetic doesn't hold the numbers on the
way, its output shows it, and the item fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mdattn_mpi.dataset import TENSORS, Dataset, Item
from mdattn_mpi.errors import ItemError
from mdattn_mpi.problem import AttentionProblem, Span

Array = np.ndarray[Any, np.dtype[Any]]

# Without its sign, the pattern of a number that is not finite is at least that of infinity.
INFINITY = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}
UNSIGNED = np.uint16(0x7FFF)
BLOCK = 1 << 17  # 256 KiB of 16-bit numbers stay in cache
READ_TOKENS = 4096


def check_finite(
    shards: Sequence[Array], spans: Sequence[Sequence[Span]], file: str, item: str
) -> None:
    """Look at query, key and value ``[tokens, heads, dim]``, which hold the tokens of `spans`.

    And at the sinks ``[heads]``, where there are any: −∞ is one, which takes no weight.

    Raises
    ------
    ItemError
        A number is NaN or infinite; says which.

    """
    for name, shard, runs in zip((*TENSORS, "sinks"), shards, spans, strict=False):
        at = first_nonfinite(shard if name != "sinks" else np.maximum(shard, 0))
        if at is None:
            continue
        place = f"head {at}" if name == "sinks" else _place(at, shard.shape, runs)
        raise ItemError(
            f"{name} holds {shard.reshape(-1)[at]} at {place}",
            fix="correct the input, or take it as it is with --nonfinite pass",
            file=file,
            item=item,
        )


def check_output(
    item: Item,
    spans: Sequence[Span],
    output: Array,
    lse: Array | None,
    *,
    backend: str,
    may_be_nonfinite: Callable[[], bool],
) -> None:
    """Look at a rank's part of the output, the query tokens of `spans`, before it is written.

    `output` is ``[tokens, Nq, Hv]``, 16 bits; `lse` ``[tokens, Nq]``, float32, −∞ where no key is
    seen, or None. `may_be_nonfinite` is asked only if something isn't finite: whether its input
    explains that.

    Raises
    ------
    ItemError
        A number is NaN or infinite and may not be; says which, and what to do.

    """
    at = first_nonfinite(output)
    if at is not None and not may_be_nonfinite():
        raise ItemError(
            f"the output holds {output.reshape(-1)[at]} at {_place(at, output.shape, spans)}, "
            f"though the input is finite: its values or scores are too large for {backend}",
            fix="report this"
            if backend == "cpu"
            else "compute it with -b cpu, in float64 where needed",
            item=item.name,
        )
    if lse is None:
        return
    bad = ~np.isfinite(lse)
    if bad.any():
        bad &= _seeing(item.problem, _tokens(spans))[:, None] | ~np.isneginf(lse)
    if bad.any() and not may_be_nonfinite():
        at = int(np.argmax(bad))
        raise ItemError(
            f"the log-sum-exp at {_place(at, lse.shape, spans)} is {lse.reshape(-1)[at]}: "
            "scores are beyond float32",
            fix="run it without --lse, into another output: the attention itself may be right",
            item=item.name,
        )


def _seeing(problem: AttentionProblem, tokens: Array) -> Array:
    """Say which query tokens see a key; others may have −∞ as their log-sum-exp."""
    low, high = problem.mask.low, problem.mask.high
    seen = np.ones(len(tokens), bool)
    if high is not None:
        seen &= tokens + high >= 0
    if low is not None:
        seen &= tokens + low < problem.kv_tokens
    return seen


def is_finite(dataset: Dataset, item: Item) -> bool:
    """Read an item and say whether all of its numbers are finite."""
    problem = item.problem
    for tensor in TENSORS:
        tokens = problem.q_tokens if tensor == "query" else problem.kv_tokens
        for start in range(0, tokens, READ_TOKENS):
            span = Span(start, min(start + READ_TOKENS, tokens))
            if first_nonfinite(dataset.read(item, tensor, (span,))) is not None:
                return False
    if not problem.sinks:
        return True
    return first_nonfinite(np.maximum(dataset.read(item, "sinks", ()), 0)) is None


def _place(at: int, shape: tuple[int, ...], spans: Sequence[Span]) -> str:
    """Say where the flat position `at` is; dim 0 are the tokens of `spans`."""
    row, head, *dim = np.unravel_index(at, shape)
    return f"token {_tokens(spans)[row]}, head {head}" + "".join(f", dim {d}" for d in dim)


def _tokens(spans: Sequence[Span]) -> Array:
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])


def first_nonfinite(array: Array) -> int | None:
    """Position in the flat array of the first NaN or infinity; None when all is finite."""
    if array.dtype not in INFINITY:
        bad = ~np.isfinite(array.reshape(-1))
        return int(np.argmax(bad)) if bad.any() else None
    infinity = np.uint16(INFINITY[array.dtype])
    bits = array.reshape(-1).view(np.uint16)
    scratch = np.empty(min(BLOCK, bits.size), np.uint16)
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        magnitude = np.bitwise_and(block, UNSIGNED, out=scratch[: block.size])
        if magnitude.max() >= infinity:
            return start + int(np.argmax(magnitude >= infinity))
    return None
