"""Comparing an output with the reference, row by row, and its bytes with the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.verifier.reference import Doubles, Reference, reference
from mdattn_mpi.verifier.tolerance import (
    ELEMENT,
    Rounding,
    deviation,
    lse_tolerance,
    rms_limit,
)

Array = NDArray[Any]

DOCUMENTS = 32  # of which the borders are looked at
PASS_BYTES = 64 << 20  # of float64 output that one pass over the keys may hold


@dataclass(frozen=True)
class Place:
    """One query row of one head."""

    row: int
    head: int


class Measure(NamedTuple):
    """Error and tolerance of every row and head, ``[R, Nq]``."""

    error: Doubles
    tolerance: Doubles


@dataclass
class Judgement:
    """What was found in the rows of one item that were looked at.

    ``used`` is the largest share of a tolerance that any row and head used up: right is at most 1.
    ``error`` and ``tolerance`` are of that place, ``worst``. ``lse_used`` is the same of the
    log-sum-exp; None where the output has none.
    """

    rows: int = 0
    compared: int = 0  # rows × heads
    used: float = 0.0
    error: float = 0.0
    tolerance: float = 0.0
    worst: Place | None = None
    lse_used: float | None = None
    lse_worst: Place | None = None
    not_judged: int = 0  # rows × heads that see an input which is not finite
    wrong: int = 0  # rows × heads out of tolerance

    @property
    def judged(self) -> bool:
        """Whether anything could be judged."""
        return self.not_judged < self.compared

    @property
    def right(self) -> bool:
        """Whether everything that could be judged is within its tolerance."""
        return not self.wrong


@dataclass(frozen=True)
class Source:
    """Where the numbers of one item come from: token-major arrays of the tokens in some spans."""

    problem: AttentionProblem
    read_input: Callable[[str, Sequence[Span]], Array]
    read_output: Callable[[str, Sequence[Span]], Array]
    lse: bool = False


def judge(source: Source, rows: Array, rounding: Rounding) -> Judgement:
    """Compare the output's `rows` (ascending) with float64 attention, some at a time."""
    problem = source.problem
    row_bytes = 8 * problem.q_heads * max(problem.head_dim, problem.v_head_dim)
    step = max(1, PASS_BYTES // row_bytes)
    found = Judgement(len(rows), len(rows) * problem.q_heads, lse_used=0.0 if source.lse else None)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        spans = tuple(runs(some))
        truth = reference(
            problem,
            some,
            source.read_input("query", spans),
            lambda tensor, span: source.read_input(tensor, (span,)),
            source.read_input("sinks", ()) if problem.sinks else None,
        )
        output = source.read_output("output", spans)
        lse = source.read_output("lse", spans) if source.lse else None
        _add(found, problem, some, truth, output, lse, rounding)
    return found


def _add(
    found: Judgement,
    problem: AttentionProblem,
    rows: Array,
    truth: Reference,
    output: Array,
    lse: Array | None,
    rounding: Rounding,
) -> None:
    measures = measure(problem, truth, output, rounding)
    used = np.where(truth.finite, excess(measures), 0.0)
    wrong = used > 1
    place = np.unravel_index(used.argmax(), used.shape)
    if found.worst is None or used[place] > found.used:
        stricter = max(measures, key=lambda pair: float(_ratio(*pair)[place]))
        found.used = float(used[place])
        found.worst = Place(int(rows[place[0]]), int(place[1]))
        found.error, found.tolerance = (float(array[place]) for array in stricter)
    if lse is not None:
        lse_used = np.where(truth.finite, lse_excess(problem, truth, lse, rounding), 0.0)
        wrong |= lse_used > 1
        place = np.unravel_index(lse_used.argmax(), lse_used.shape)
        if found.lse_worst is None or lse_used[place] > (found.lse_used or 0.0):
            found.lse_used = float(lse_used[place])
            found.lse_worst = Place(int(rows[place[0]]), int(place[1]))
    found.wrong += int(wrong.sum())
    found.not_judged += int((~truth.finite).sum())


def measure(
    problem: AttentionProblem, truth: Reference, output: Array, rounding: Rounding
) -> tuple[Measure, Measure]:
    """Measure every row and head twice: root mean square over its elements, and worst element."""
    sigma = deviation(problem, truth, rounding)
    error = np.abs(output.astype(np.float64) - truth.output)
    allowed = ELEMENT * sigma
    worst = _ratio(error, allowed).argmax(axis=2)[..., None]
    return (
        Measure(
            np.sqrt((error**2).mean(axis=2)),
            rms_limit(problem.v_head_dim) * np.sqrt((sigma**2).mean(axis=2)),
        ),
        Measure(*(np.take_along_axis(array, worst, axis=2)[..., 0] for array in (error, allowed))),
    )


def excess(measures: Sequence[Measure]) -> Doubles:
    """Return error / tolerance of every row and head, ``[R, Nq]``: above 1 is wrong.

    An output that isn't finite is infinitely wrong.
    """
    used: Doubles = np.maximum.reduce([_ratio(*found) for found in measures])
    return used


def lse_excess(
    problem: AttentionProblem, truth: Reference, lse: Array, rounding: Rounding
) -> Doubles:
    """Return error / tolerance of every log-sum-exp, ``[R, Nq]``; −∞ must be met exactly."""
    with np.errstate(invalid="ignore"):
        error = np.abs(lse.astype(np.float64) - truth.lse)
    error[np.isneginf(lse) & np.isneginf(truth.lse)] = 0
    return _ratio(error, lse_tolerance(problem, truth, rounding))


def _ratio(error: Doubles, allowed: Doubles) -> Doubles:
    """Divide; what should be exact is either right, 0, or infinitely wrong."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    judged: Doubles = np.where(np.isnan(ratio), np.inf, ratio)
    return judged


def choose_rows(
    problem: AttentionProblem, borders: Sequence[int], count: int, seed: Sequence[int]
) -> Array:
    """Choose the query rows to look at, ascending.

    Always the first and the last, both sides of every border between shards, of the first row that
    sees a key, the first that a window keeps from one, and some documents; and `count` more at
    random.
    """
    length, generator = problem.q_tokens, np.random.default_rng(seed)
    first_seeing = max(0, -(problem.diagonal or 0))
    first_kept = first_seeing + problem.window[0] + 1 if problem.window[0] >= 0 else 0
    documents = generator.permutation(problem.segments)[:DOCUMENTS].astype(int)
    borders = (*borders, first_seeing, first_kept, *documents)
    sides = [row for border in borders for row in (border - 1, border)]
    drawn = generator.choice(length, min(count, length), replace=False)
    chosen = np.unique(np.concatenate([[0, length - 1], sides, drawn]).astype(np.int64))
    return chosen[(chosen >= 0) & (chosen < length)]


def runs(rows: Array) -> Iterator[Span]:
    """Cut ascending `rows` into runs of neighbours."""
    for part in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield Span(int(part[0]), int(part[-1]) + 1)
