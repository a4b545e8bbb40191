"""What a rank knows of its output while keys are still to come."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

SMALLEST_SCALE = 2.0**-126  # float32 has fewer bits for what is smaller


class Partial:
    """The attention of one query shard to the keys seen so far.

    Parameters
    ----------
    q
        ``[Sq, Nq, H]``, bfloat16 or float16.
    v_head_dim
        ``Hv`` of the values to come.
    scale, softcap
        What scores are multiplied with, and then capped with; 0: not at all.

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

    def __init__(self, q: Array, v_head_dim: int, scale: float, softcap: float = 0.0) -> None:
        tokens, heads, _ = q.shape
        self.q = q
        self.scale = float(scale)
        self.softcap = float(softcap)
        self.output = np.empty((tokens, heads, v_head_dim), np.float32)
        self.weight = np.empty((tokens, heads), np.float32)
        self.reference = np.full((tokens, heads), -np.inf)
        self.wide = np.full((tokens, heads), self.scale < SMALLEST_SCALE)

    def finish(self, tokens: slice, out: Array, lse: Floats, sinks: Array | None = None) -> None:
        """Round the output of some tokens into `out`, the log-sum-exp into `lse`.

        `sinks` ``[Nq]`` are one score more, without a value.
        """
        weight, reference = self.weight[tokens], self.reference[tokens]
        logs = np.log(weight) + reference
        unseen = (reference == -np.inf) | (weight == 0)
        logs[unseen] = -np.inf
        if sinks is None:
            out[tokens], lse[tokens] = self.output[tokens], logs
        else:
            lse[tokens] = every = np.logaddexp(logs, sinks)
            out[tokens] = self.output[tokens] * np.exp(logs - every)[..., None]
        out[tokens][unseen] = 0
