"""The proof of an attention engine, before it gets an item: known numbers, and float64 beside it.

Multi-device layers have been seen to do nothing, or something among the wrong ranks, without a word
(`versions`), and then every rank gives a plausible attention to the wrong keys. So each engine
attends once to numbers that all ranks know: other ones on every rank of the job, of which scores
decide sharply, under the engine's own mask, at the fewest tokens that give every rank some. Sampled
rows are held against float64 by the tolerance of ``mdattn verify``.

A proof must be able to fail. What a rank would get from its own keys alone, and zeros, are judged
in the same way, and have to be far from right; what came out instead is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.partition import equal_partition
from mdattn_mpi.problem import AttentionProblem, Causal, Partition
from mdattn_mpi.trt.library import Library
from mdattn_mpi.trt.networks import NETWORKS
from mdattn_mpi.trt.spec import EngineSpec, Extent, Shapes
from mdattn_mpi.trt.versions import faults_of
from mdattn_mpi.verifier.compare import excess, measure
from mdattn_mpi.verifier.reference import Reference, reference
from mdattn_mpi.verifier.tolerance import TENSOR_CORES

Array = NDArray[Any]
DTYPES: dict[str, Any] = {"bfloat16": bfloat16, "float16": np.float16}

TOKENS = 16  # a rank, where the profile has so few
ROWS = 8  # of a rank that are compared
SHARPNESS = 3.0  # standard deviation of the scores: one key counts, and FP16 sums are seen
FAR = 8.0  # times the tolerance: a negative control that comes nearer proves nothing
NEAR = 64.0  # times the tolerance: right, but for rounding that is too coarse
OTHERS = 64  # ranks of other groups that are thought of when something is wrong


def shortest_problem(spec: EngineSpec) -> AttentionProblem:
    """Find the shortest problem of which every rank has some tokens, and that `spec` takes.

    Raises
    ------
    RejectedError
        There is none: no item could use such an engine either.

    """
    queries, keys = list(_totals(spec.q, spec)), list(_totals(spec.kv, spec))
    alike = [(tokens, tokens) for tokens in queries if tokens in keys]
    # An engine's lower-right mask may be a rank's part of an upper-left one.
    masks: tuple[Causal, ...] = (spec.mask, "upper_left")[: 1 + (spec.mask == "lower_right")]
    heads = (spec.q_heads, spec.kv_heads, spec.head_dim, spec.head_dim)
    for mask, lengths in product(masks, (*alike, *product(queries, keys))):
        problem = AttentionProblem(*lengths, *heads, spec.dtype, mask, spec.scale)
        if _takes(spec, problem):
            return problem
    raise RejectedError(f"no attention fits an engine for {spec}", fix="build it again")


def _totals(extent: Extent, spec: EngineSpec) -> Iterator[int]:
    """Tokens of a sequence, such that a rank has what it should have, or what it may have."""
    wanted = min(max(TOKENS, extent.min), extent.max)
    for rows in dict.fromkeys((wanted, extent.max, extent.min)):
        yield from range(rows * spec.ranks, (rows - 1) * spec.ranks, -1)


def _takes(spec: EngineSpec, problem: AttentionProblem) -> bool:
    network = NETWORKS[spec.strategy]
    try:
        network.refuse(problem, spec.ranks)
    except RejectedError:
        return False
    if network.mask(problem) != spec.mask:
        return False
    if problem.causal == "lower_right" and problem.q_tokens > problem.kv_tokens:
        return False
    every = (network.shapes(problem, spec.ranks, rank) for rank in range(spec.ranks))
    return all(_within(spec, shapes) for shapes in every)


def _within(spec: EngineSpec, shapes: Shapes) -> bool:
    extents = (spec.q, spec.kv, spec.keys)
    return all(low.min <= n <= low.max for low, n in zip(extents, shapes, strict=True))


@dataclass(frozen=True)
class KnownItem:
    """An item whose numbers every rank can make: those of a rank come from its number in the job.

    Attributes
    ----------
    world_ranks
        The ranks of the group, in order, by their number in the job.
    seed
        Makes it another item for every engine, so that nothing left in memory looks right.

    """

    problem: AttentionProblem
    partition: Partition
    world_ranks: Sequence[int]
    seed: int

    @staticmethod
    def of(spec: EngineSpec, world_ranks: Sequence[int], digest: str) -> KnownItem:
        """Make the one by which the engine of SHA-256 `digest` is proven."""
        problem = shortest_problem(spec)
        partition = equal_partition(problem, spec.ranks)
        return KnownItem(problem, partition, tuple(world_ranks), int(digest[:12], 16))

    def shards(self, rank: int) -> tuple[Array, Array, Array]:
        """Query, key and value of a rank of the group."""
        return self._query(rank), *self._key_and_value(rank)

    def _query(self, rank: int) -> Array:
        problem, (span,) = self.problem, self.partition.query[rank]
        random = np.random.default_rng((self.seed, self.world_ranks[rank], 0))
        query = random.standard_normal((len(span), problem.q_heads, problem.head_dim), np.float32)
        query *= np.clip(SHARPNESS / (problem.scale * problem.head_dim**0.5), 2**-10, 2**10)
        return query.astype(DTYPES[problem.dtype])

    def _key_and_value(self, rank: int) -> tuple[Array, Array]:
        problem, (span,) = self.problem, self.partition.kv[rank]
        random = np.random.default_rng((self.seed, self.world_ranks[rank], 1))
        dims = (problem.kv_heads, problem.head_dim)
        # A value's mean is its rank's, so that a missing rank is missed; its keys are like all.
        mean = random.choice(np.array([-2, 2], np.float32), dims)
        key = random.standard_normal((len(span), *dims), np.float32)
        value = random.standard_normal((len(span), *dims), np.float32) + mean
        return key.astype(DTYPES[problem.dtype]), value.astype(DTYPES[problem.dtype])

    @cached_property
    def keys_and_values(self) -> tuple[Array, Array]:
        """Those of the whole sequence."""
        keys, values = zip(*map(self._key_and_value, range(len(self.world_ranks))), strict=True)
        return np.concatenate(keys), np.concatenate(values)

    def sample(self, rank: int) -> tuple[Array, Array]:
        """Positions in the sequence of the rows that a rank compares, and their queries."""
        (span,) = self.partition.query[rank]
        rows = np.unique(np.linspace(0, max(0, len(span) - 1), ROWS).astype(np.int64))
        rows = rows[: len(span)]
        return rows + span.start, self._query(rank)[rows]


@dataclass(frozen=True)
class Verdict:
    """What the proof found on one rank; errors are in units of the tolerance.

    ``seen`` says what came out where ``error`` is above 1. ``control`` is how far attention to the
    rank's own keys alone would be, None where no other rank's key is seen by a row.
    """

    error: float
    control: float | None
    zeros: float
    seen: str = ""


def judge(item: KnownItem, rank: int, output: Array) -> Verdict:
    """Hold a rank's `output` ``[Sq, Nq, H]`` of a known item against float64.

    Parameters
    ----------
    item
        What was attended to.
    rank
        Of the group.
    output
        The rank's own rows.

    """
    problem = item.problem
    rows, query = item.sample(rank)
    if not len(rows):
        return Verdict(0.0, None, np.inf)
    (own,), (keys,) = item.partition.query[rank], item.partition.kv[rank]
    key, value = item.keys_and_values
    whole = {"key": key, "value": value}
    truth = reference(problem, rows, query, lambda name, span: whole[name][span.slice])
    found = output[rows - own.start].astype(np.float64)
    error = _distance(problem, truth, found)
    seen = _visible(problem, rows)
    others = seen.copy()
    others[:, keys.slice] = False
    alone = _attend(query, key, value, seen & ~others, problem.scale)
    return Verdict(
        error,
        _distance(problem, truth, alone) if others.any() else None,
        _distance(problem, truth, np.zeros_like(found)),
        "" if error <= 1 else _name(item, rank, truth, found),
    )


def _distance(problem: AttentionProblem, truth: Reference, found: Array) -> float:
    """Worst error over all rows and heads, as a multiple of its tolerance."""
    return float(excess(measure(problem, truth, found, TENSOR_CORES)).max())


def _visible(problem: AttentionProblem, rows: Array) -> NDArray[np.bool_]:
    """Which keys each of `rows` sees, ``[R, Skv]``."""
    diagonal = problem.kv_tokens if problem.diagonal is None else problem.diagonal
    visible: NDArray[np.bool_] = np.arange(problem.kv_tokens) <= rows[:, None] + diagonal
    return visible


def _attend(query: Array, key: Array, value: Array, seen: Array, scale: float) -> Array:
    """Attend in float64 to the keys that are ``seen [R, Skv]``; 0 where there is none."""
    some, group = np.flatnonzero(seen.any(axis=0)), query.shape[1] // key.shape[1]
    seen, found = np.repeat(seen[:, some], group, axis=0), np.empty(query.shape)
    for head in range(key.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        k, v = (array[some, head].astype(np.float64) for array in (key, value))
        rows = scale * query[:, heads].reshape(-1, query.shape[2]).astype(np.float64)
        scores = np.where(seen, rows @ k.T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-1e300))
        mean = weights @ v / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
        found[:, heads] = mean.reshape(found[:, heads].shape)
    return found


def no_answer(found: Array) -> str:
    """Say in words why numbers are no answer to anything; empty where they may be one."""
    if np.isnan(found).all():
        return "NaN in every row, as if nothing was written"
    if not np.isfinite(found).all():
        return "numbers that aren't finite"
    return "" if found.any() else "zeros"


def _name(item: KnownItem, rank: int, truth: Reference, found: Array) -> str:
    """Say in words what came out instead of the right thing."""
    if plain := no_answer(found):
        return plain
    for what, guess in _guesses(item, rank):
        if _distance(item.problem, replace(truth, output=guess), found) <= 1:
            return what
    error = _distance(item.problem, truth, found)
    if error <= NEAR and item.problem.dtype == "float16":
        return "the right numbers, rounded as if they were summed in FP16"
    if error <= NEAR:
        return "the right numbers, with too large an error"
    return "numbers that belong to no rank"


def _guesses(item: KnownItem, rank: int) -> Iterator[tuple[str, Array]]:
    """What broken collectives may give: keys of one rank, or another rank's output."""
    problem, ranks = item.problem, item.world_ranks
    rows, query = item.sample(rank)
    key, value = item.keys_and_values
    seen = _visible(problem, rows)
    for other, (span,) in enumerate(item.partition.kv):
        some = np.zeros_like(seen)
        some[:, span.slice] = seen[:, span.slice]
        whose = "its own keys only" if other == rank else f"the keys of rank {ranks[other]} only"
        yield f"attention to {whose}", _attend(query, key, value, some, problem.scale)
    for other, world_rank in enumerate(ranks):
        theirs, asked = item.sample(other)
        if other != rank and len(theirs) == len(rows):
            output = _attend(asked, key, value, _visible(problem, theirs), problem.scale)
            yield f"the output of rank {world_rank}", output
    yield from _strangers(item, query, seen)


def _strangers(item: KnownItem, query: Array, seen: Array) -> Iterator[tuple[str, Array]]:
    """Attention to the keys of ranks that follow each other and aren't those of the group."""
    size = len(item.world_ranks)
    for first in range(0, OTHERS, size):
        strangers = replace(item, world_ranks=tuple(range(first, first + size)))
        if not set(strangers.world_ranks) & set(item.world_ranks):
            key, value = strangers.keys_and_values
            yield (
                f"the keys of another group's ranks, {first} to {first + size - 1}",
                _attend(query, key, value, seen, item.problem.scale),
            )


def conclude(
    spec: EngineSpec, library: Library, world_ranks: Sequence[int], verdicts: Sequence[Verdict]
) -> None:
    """Refuse an engine that is wrong on any rank, or whose proof couldn't have failed.

    Raises
    ------
    DeviceError
        With the library, its version, what came out on the first rank that is wrong, and what is
        known of this version.

    """
    wrong = [(rank, one) for rank, one in zip(world_ranks, verdicts, strict=True) if one.error > 1]
    if wrong:
        rank, one = wrong[0]
        faults = faults_of(library.flavour, library.version, spec.strategy, spec.dtype)
        known = [fault for fault in faults if fault.at_once]  # the others stop the builder
        raise DeviceError(
            f"{library} computes wrong attention by {spec}: {len(wrong)} of {len(verdicts)} ranks; "
            f"rank {rank} gives {one.seen} ({one.error:.3g} times the tolerance)"
            + "".join(f". This version is known for {fault}" for fault in known),
            rank=rank,
            fix=_instead(spec),
        )
    controls = [one.control for one in verdicts if one.control is not None]
    near = min([*controls, *(one.zeros for one in verdicts)])
    if near < FAR or (spec.ranks > 1 and not controls):
        raise DeviceError(
            f"the engine for {spec} can't be proven: what is wrong would look right "
            f"({near:.3g} times the tolerance)",
            fix=_instead(spec),
        )


def _instead(spec: EngineSpec) -> str:
    others = [name for name in ("ulysses", "allgather") if name != spec.strategy]
    return f"use -b cuda, or try -s {' or -s '.join(others)}"
