"""Which keys a query sees, from the definition: always one run.

The verifier knows nothing of how the strategies cut masks; see `AttentionProblem` for the words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.problem import AttentionProblem


class Visible(NamedTuple):
    """The first and the last key of each row, ``[R]``; the last is before the first for none."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @property
    def any(self) -> NDArray[np.bool_]:
        """Which rows see a key."""
        return self.last >= self.first


def visible(problem: AttentionProblem, rows: NDArray[Any]) -> Visible:
    """Return what the query tokens `rows` see; both ends ascend with them."""
    before, after = problem.window
    diagonal = rows + (problem.diagonal or 0)
    first = np.zeros(len(rows), np.int64)
    last = np.full(len(rows), problem.kv_tokens - 1)
    if problem.causal != "none":
        last = np.minimum(last, diagonal)
    if after >= 0:
        last = np.minimum(last, diagonal + after)
    if before >= 0:
        first = np.maximum(first, diagonal - before)
    if problem.segments:
        starts = np.array([*problem.segments, problem.q_tokens])
        document = np.searchsorted(starts, rows, side="right") - 1
        first = np.maximum(first, starts[document])
        last = np.minimum(last, starts[document + 1] - 1)
    return Visible(first, last)
