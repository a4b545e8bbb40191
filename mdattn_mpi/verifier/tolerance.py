r"""How far an honest engine may be from float64, from how it rounds.

Let ``u`` be the unit roundoff of the 16-bit dtype (2⁻⁸ for bfloat16, 2⁻¹¹ for float16), ``e`` that
of float32 (2⁻²⁴), and for one output element ``o = Σ p v``: ``spread² = Σ p² v²`` and ``peak`` the
largest partial sum on the way. A rounding to 16 bits changes a number by at most a factor 1 ± u,
evenly spread, so its variance is at most u²/3 of the square. Independent errors add in variance
(Higham, Accuracy and Stability of Numerical Algorithms, §2.8; Higham and Mary, 2019):

1. The output is rounded once.                                             u²/3 · o²
2. Tensor cores take each weight p in 16 bits.                             u²/3 · spread²
3. cuDNN gives 16-bit partial results, which ring and allgather merge; a
   partial result is a difference of two partial sums.                     u²/3 · peak²
4. A score is a float32 sum of H products; no partial sum of these is
   above ‖q‖·‖k‖·scale. Its error, √H·e times that, is a relative one of p;
   one above 1 has no meaning. A CPU goes over to float64 beyond 2¹⁰.         H·e²·bound² · spread²
5. Σ p and Σ p v are float32 sums of S terms.                              S·e² · (peak² + spread²)
6. float16 is subnormal below 2⁻¹⁴.                                        2⁻⁵⁰/3

Their sum is σ². Over the Hv dims of one row and head, the root mean square error of a right output
is about 0.7 σ (mantissas are spread over [1, 2)), give or take a factor that narrows as 1/√Hv;
where every output is rounded by the most possible it is √3 σ. So it must stay below
1.6 (1 + 2/√Hv) σ, and each element below 8 σ. An output that is 1 % wrong is at 0.01/(u/√3) = 4.4 σ
in bfloat16 when only the output is rounded, 2.6 σ with 2 and 3 on top; a softmax scale that is 1 %
wrong is at √2 times that, unless a mean that all values share hides it below the rounding. Another
head's output, zeros or a missing shard are at hundreds of σ; a mask wrong by one key is, in the
rows that see few keys.

A log-sum-exp inherits the errors of its scores and of Σ p: it must stay within
8 (√H·bound + √S + |lse|)·e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.verifier.reference import Doubles, Reference

ELEMENT: Final = 8.0
LSE: Final = 8.0

UNIT: Final = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
SUBNORMAL: Final = {"bfloat16": 2.0**-134, "float16": 2.0**-25}
UNIT_32: Final = 2.0**-24
UNIT_64: Final = 2.0**-53


@dataclass(frozen=True)
class Rounding:
    """What an engine rounds to 16 bits besides its output."""

    weights: bool
    partials: bool
    score_bound: float = np.inf  # above it, scores are computed in float64


HOST = Rounding(weights=False, partials=False, score_bound=2.0**10)
TENSOR_CORES = Rounding(weights=True, partials=True)


def rounding_of(backend: str) -> Rounding:
    """Look up the backend that an output names; one that isn't known counts as a GPU."""
    return HOST if backend == "cpu" else TENSOR_CORES


def deviation(problem: AttentionProblem, found: Reference, rounding: Rounding) -> Doubles:
    """Return σ of every output element: ``[R, Nq, Hv]``."""
    once = UNIT[problem.dtype] ** 2 / 3
    spread, peak = found.spread**2, found.peak**2
    variance = once * found.output**2 + SUBNORMAL[problem.dtype] ** 2 / 3
    if rounding.weights:
        variance += once * spread
    if rounding.partials:
        variance += once * peak
    error = score_error(problem, found, rounding)[..., None]
    variance += np.minimum(error, 1) ** 2 * spread
    variance += problem.kv_tokens * UNIT_32**2 * (peak + spread)
    variance[np.isneginf(found.lse)] = 0  # a row that sees no key is exactly 0
    sigma: Doubles = np.sqrt(variance)
    return sigma


def score_error(problem: AttentionProblem, found: Reference, rounding: Rounding) -> Doubles:
    """Return the error that a row's scores may have: ``[R, Nq]``."""
    bound = found.score_bound
    unit = np.where(bound > rounding.score_bound, UNIT_64, UNIT_32)
    error: Doubles = np.sqrt(problem.head_dim) * unit * bound
    return error


def rms_limit(v_head_dim: int) -> float:
    """Return how many σ the root mean square over `v_head_dim` elements may reach."""
    return 1.6 * (1 + 2 / float(np.sqrt(v_head_dim)))


def lse_tolerance(problem: AttentionProblem, found: Reference, rounding: Rounding) -> Doubles:
    """Return the largest allowed error of every log-sum-exp: ``[R, Nq]``."""
    size = np.where(np.isfinite(found.lse), np.abs(found.lse), 0.0)
    sums = UNIT_32 * (np.sqrt(problem.kv_tokens) + size)
    allowed: Doubles = LSE * (score_error(problem, found, rounding) + sums)
    return allowed
