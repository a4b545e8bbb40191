"""What a rank knows of its output while keys are still to come."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]

SMALLEST_SCALE = 2.0**-126  # float32 has fewer bits for what is smaller


class Partial:
    """The attention of one query shard to the keys seen so far.

    Parameters
    ----------
    q
        ``[Sq, Nq, H]``, bfloat16 or float16.
    v_head_dim
        ``Hv`` of the values to come.
    scale
        What scores are multiplied with.

    Attributes
    ----------
    output
        ``[Sq, Nq, Hv]``, float32: the output if there were no more keys.
    weight
        ``[Sq, Nq]``, float32: the sum of ``exp(score - reference)``.
    reference
        ``[Sq, Nq]``, float64; −∞ where nothing has been stored, and the others are undefined:
        touching fresh memory twice would take as long as a product.
    wide
        ``[Sq, Nq]``: where float32 is not enough to go on with.

    """

    def __init__(self, q: Array, v_head_dim: int, scale: float) -> None:
        tokens, heads, _ = q.shape
        self.q = q
        self.scale = float(scale)
        self.output = np.empty((tokens, heads, v_head_dim), np.float32)
        self.weight = np.empty((tokens, heads), np.float32)
        self.reference = np.full((tokens, heads), -np.inf)
        self.wide = np.full((tokens, heads), self.scale < SMALLEST_SCALE)

    def finish(self, tokens: slice, out: Array, lse: Floats) -> None:
        """Round the output of some tokens into `out`, the log-sum-exp into `lse`."""
        weight, reference = self.weight[tokens], self.reference[tokens]
        out[tokens] = self.output[tokens]
        lse[tokens] = np.log(weight) + reference
        unseen = (reference == -np.inf) | (weight == 0)
        if unseen.any():
            out[tokens][unseen] = 0
            lse[tokens][unseen] = -np.inf
