"""NaN and infinity in an input shard, found on the 16-bit patterns without any arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.errors import ItemError
from mdattn_mpi.problem import Span

# Without its sign, the pattern of a number that is not finite is at least that of infinity.
INFINITY = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}
UNSIGNED = np.uint16(0x7FFF)
BLOCK = 1 << 17  # 256 KiB of 16-bit numbers stay in cache


def check_finite(
    shards: Sequence[NDArray[Any]], spans: Sequence[Sequence[Span]], file: str, item: str
) -> None:
    """Look at query, key and value ``[tokens, heads, dim]``, which hold the tokens of `spans`.

    Raises
    ------
    ItemError
        A number is NaN or infinite; says which.

    """
    for name, shard, runs in zip(("query", "key", "value"), shards, spans, strict=True):
        at = first_nonfinite(shard)
        if at is None:
            continue
        row, head, dim = np.unravel_index(at, shard.shape)
        tokens = [token for run in runs for token in range(run.start, run.stop)]
        raise ItemError(
            f"{name} holds {shard.reshape(-1)[at]} at token {tokens[row]}, head {head}, dim {dim}",
            fix="mend the input, or take it as it is with --nonfinite pass",
            file=file,
            item=item,
        )


def first_nonfinite(array: NDArray[Any]) -> int | None:
    """Position in the flat array of the first NaN or infinity; None when all is finite."""
    infinity = np.uint16(INFINITY[array.dtype])
    bits = array.reshape(-1).view(np.uint16)
    scratch = np.empty(min(BLOCK, bits.size), np.uint16)
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        magnitude = np.bitwise_and(block, UNSIGNED, out=scratch[: block.size])
        if magnitude.max() >= infinity:
            return start + int(np.argmax(magnitude >= infinity))
    return None
