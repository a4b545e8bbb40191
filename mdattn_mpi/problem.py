"""What is to be computed: frozen descriptions that all ranks must share.

Shape letters, used everywhere in the package:

====  =======================================================
S     tokens of a sequence (``Sq`` of the query, ``Skv`` of key and value)
N     heads (``Nq`` of the query, ``Nkv`` of key and value)
H     head dim (``Hv`` of value and output)
P     ranks of the group that works on one item
====  =======================================================

Arrays are token-major, ``[S, N, H]``: a rank's tokens are then one run in memory and on disk.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import prod, sqrt
from typing import Any, Literal, get_args

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import UNBOUNDED, Mask, segments_of, window_of
from mdattn_mpi.mask import Span as Span

Causal = Literal["none", "upper_left", "lower_right"]
DTypeName = Literal["bfloat16", "float16"]
StrategyName = Literal["ring", "allgather", "ulysses", "hierarchical"]
STRATEGY_NAMES: tuple[StrategyName, ...] = get_args(StrategyName)
# Those that know nothing of nodes.
FLAT_STRATEGIES = tuple(name for name in STRATEGY_NAMES if name != "hierarchical")
KernelName = Literal["cudnn", "flash"]
KERNEL_NAMES: tuple[KernelName, ...] = get_args(KernelName)

DTYPES: dict[str, DTypeName] = {"bf16": "bfloat16", "fp16": "float16"}  # by what users type

MAX_HEAD_DIM = 256
MIN_SCALE, MAX_SCALE = 2.0**-149, (2 - 2.0**-23) * 2.0**127  # the positive numbers of float32


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of an item: its shape for the whole sequence, its dtype by NumPy's name.

    ``token_dim`` counts tokens; None where no dim does. The dims before it are 1, so that some
    tokens in a row are one run of bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    token_dim: int | None = 0

    def with_tokens(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of a part of so many tokens; of all of it where no dim counts them."""
        if self.token_dim is None:
            return self.shape
        return (*self.shape[: self.token_dim], tokens, *self.shape[self.token_dim + 1 :])

    @property
    def nbytes(self) -> int:
        """Bytes of all of it; NumPy's names of numbers end in their bits."""
        return prod(self.shape) * int(self.dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


@dataclass(frozen=True)
class AttentionProblem:
    """The shapes, dtype, mask and scale of one item's attention.

    ``softmax(scale · Q Kᵀ + mask) V`` over Q ``[Sq, Nq, H]``, K ``[Skv, Nkv, H]`` and
    V ``[Skv, Nkv, Hv]``. ``Nkv`` divides ``Nq``: query head ``n`` reads kv head
    ``n // (Nq / Nkv)``.

    ``causal`` follows TensorRT's ``CausalMaskKind``: query ``i`` sees key ``j`` when
    ``j <= i`` (``upper_left``) or ``j <= i + Skv - Sq`` (``lower_right``). A query that sees no
    key gives output 0 and LSE −∞.

    ``window`` counts the keys before and after that diagonal that a query sees besides the one on
    it; −1: all that ``causal`` lets through. Without ``causal`` the diagonal is ``j = i``.
    ``segments`` are the first tokens of documents packed into one sequence: a query sees its own
    alone. ``softcap`` c makes ``c · tanh(score / c)`` of every score; 0: none.

    With ``sinks``, each query head has one score more, which takes weight and has no value
    (gpt-oss, arXiv 2508.10925; after Xiao et al., arXiv 2309.17453). The scores are an input like
    Q, K and V. They are neither scaled nor capped, and the LSE includes them.

    Raises
    ------
    RejectedError
        A length, head count, head dim, dtype, mask, scale or cap that no backend can take.

    """

    q_tokens: int
    kv_tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: DTypeName = "bfloat16"
    causal: Causal = "none"
    scale: float = None  # type: ignore[assignment]  # becomes 1/√H
    window: tuple[int, int] = UNBOUNDED
    softcap: float = 0.0
    sinks: bool = False
    segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("q_tokens", "kv_tokens", "q_heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise RejectedError(
                    f"{name} is {getattr(self, name)}", fix="give every item at least one of each"
                )
        for name in ("head_dim", "v_head_dim"):
            if not 1 <= getattr(self, name) <= MAX_HEAD_DIM:
                raise RejectedError(
                    f"{name} is {getattr(self, name)}",
                    fix=f"use head dims from 1 to {MAX_HEAD_DIM}",
                )
        if self.q_heads % self.kv_heads:
            raise RejectedError(
                f"{self.q_heads} query heads are no multiple of {self.kv_heads} kv heads",
                fix="give every kv head the same number of query heads",
            )
        if self.dtype not in get_args(DTypeName):
            raise RejectedError(f"dtype {self.dtype!r}", fix="use bfloat16 or float16")
        if self.causal not in get_args(Causal):
            raise RejectedError(
                f"causal is {self.causal!r}", fix="use none, upper_left or lower_right"
            )
        scale = 1.0 / sqrt(self.head_dim) if self.scale is None else scale_of(self.scale)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "window", self._checked_window())
        object.__setattr__(self, "softcap", softcap_of(self.softcap))
        segments = segments_of(self.segments, self.q_tokens, self.kv_tokens)
        object.__setattr__(self, "segments", segments)

    def _checked_window(self) -> tuple[int, int]:
        """Return the window as two integers, by the one way of several to say the same."""
        before, after = window_of(self.window)
        if self.causal == "none":
            return before, after
        if after > 0:
            raise RejectedError(
                f"window is ({before}, {after}) with causal {self.causal}, which hides all keys "
                "after the diagonal",
                fix=f"use ({before}, 0), or causal none",
            )
        return (before, 0) if before >= 0 else UNBOUNDED

    @property
    def tokens(self) -> int:
        """Tokens of the output."""
        return self.q_tokens

    @property
    def work(self) -> int:
        """What deadlines and rates are scaled by: operations."""
        return self.flops

    def outputs(self, lse: bool) -> tuple[TensorSpec, ...]:
        """Name the tensors that come out: ``output`` ``[Sq, Nq, Hv]`` and ``lse`` ``[Sq, Nq]``."""
        rows = (self.q_tokens, self.q_heads)
        output = TensorSpec("output", (*rows, self.v_head_dim), self.dtype)
        return (output, TensorSpec("lse", rows, "float32")) if lse else (output,)

    @property
    def group_heads(self) -> int:
        """Query heads that share one kv head."""
        return self.q_heads // self.kv_heads

    @property
    def diagonal(self) -> int | None:
        """The offset ``d`` of the mask ``j <= i + d``; None where every key is seen."""
        if self.causal == "none":
            return None
        return self.kv_tokens - self.q_tokens if self.causal == "lower_right" else 0

    @cached_property
    def mask(self) -> Mask:
        """What a query may see, whichever options say so."""
        (before, after), diagonal = self.window, self.diagonal
        high = diagonal if after < 0 else (diagonal or 0) + after
        low = None if before < 0 else (diagonal or 0) - before
        ends = (*self.segments[1:], self.q_tokens)
        documents = tuple(map(Span, self.segments, ends)) if self.segments else ()
        return Mask(low, high, documents)

    @property
    def pairs(self) -> int:
        """Query–key pairs that the mask lets through, of one head."""
        return self.pairs_before(self.q_tokens)

    def pairs_before(self, row: int) -> int:
        """Query–key pairs of one head that the rows before `row` see."""
        return self.mask.pairs_before(row, self.kv_tokens)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the two matrix products (a multiply-add is two)."""
        return 2 * self.pairs * self.q_heads * (self.head_dim + self.v_head_dim)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V together."""
        return 2 * self.kv_tokens * self.kv_heads * (self.head_dim + self.v_head_dim)

    @cached_property
    def digest(self) -> int:
        """63 bits that differ when any field differs."""
        return digest_of(self.facts())

    def facts(self) -> dict[str, Any]:
        """Return all fields by name; masks and options that came later only where they are used."""
        later = {"window": UNBOUNDED, "softcap": 0.0, "sinks": False, "segments": ()}
        values = ((name, getattr(self, name)) for name in _FIELDS)
        return {name: value for name, value in values if name not in later or value != later[name]}

    def __str__(self) -> str:
        """For example ``8192 tokens, 8 query and 2 kv heads of 128, bfloat16, upper_left``."""
        value = "" if self.head_dim == self.v_head_dim else f" (value {self.v_head_dim})"
        options = [
            self.causal if self.causal != "none" else "",
            f"window {self.window[0]} {self.window[1]}" if self.window != UNBOUNDED else "",
            f"{len(self.segments)} documents" if self.segments else "",
            f"softcap {self.softcap:g}" if self.softcap else "",
            "sinks" if self.sinks else "",
        ]
        return (
            f"{_both(self.q_tokens, self.kv_tokens)} tokens, "
            f"{_both(self.q_heads, self.kv_heads)} heads of {self.head_dim}{value}, "
            f"{', '.join([self.dtype, *filter(None, options)])}"
        )


_FIELDS = tuple(field.name for field in fields(AttentionProblem))


def _both(query: int, kv: int) -> str:
    return f"{query}" if query == kv else f"{query} query and {kv} kv"


def scale_of(given: object) -> float:
    """Take any number, NumPy's too, as a scale: positive, and one that float32 holds.

    Raises
    ------
    RejectedError
        It isn't.

    """
    try:
        scale = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        scale = 0.0
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise RejectedError(
            f"scale is {given!r}",
            fix="use a positive number that float32 can hold, or leave it out for 1/√H",
        )
    return scale


def softcap_of(given: object) -> float:
    """Take any number, NumPy's too, as a cap of scores: positive, or 0 for none.

    Raises
    ------
    RejectedError
        It isn't, or float32 doesn't hold it.

    """
    try:
        softcap = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        softcap = -1.0
    if softcap != 0 and not MIN_SCALE <= softcap <= MAX_SCALE:
        raise RejectedError(
            f"softcap is {given!r}",
            fix="use a positive number that float32 can hold, or leave it out (0) for none",
        )
    return softcap


@dataclass(frozen=True)
class Partition:
    """Who owns which tokens: ``query[r]`` and ``kv[r]`` are the spans of rank ``r``.

    A rank holds its spans one after the other in one array, in the order given here.
    """

    query: tuple[tuple[Span, ...], ...]
    kv: tuple[tuple[Span, ...], ...]


class _Agreed:
    """A plan, on which all ranks of a group must agree but for its reasons."""

    @cached_property
    def digest(self) -> int:
        """63 bits that all ranks of the group must share."""
        return digest_of(self.facts())

    def facts(self) -> dict[str, Any]:
        """What all ranks must share, by name: said when ranks differ."""
        facts = asdict(self)  # type: ignore[call-overload]
        del facts["reasons"]
        return {**facts.pop("problem"), **facts}


@dataclass(frozen=True)
class Plan(_Agreed):
    """How a group of ``ranks`` will compute ``problem``, and why so."""

    problem: AttentionProblem
    strategy: StrategyName
    ranks: int
    backend: str = "cpu"
    lse: bool = False
    engine_digest: str = ""  # of a serialized engine; all ranks must hold the same one
    partition: Partition | None = None  # None means `partition.partition` of the strategy
    node_size: int = 1  # ranks of a node, of which `hierarchical` makes its ring
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelProblem:
    """A model over one sequence: how many tokens go in, and which tensors come out.

    ``flops`` are its floating-point operations; 0 where nobody has counted them.
    """

    tokens: int
    outputs: tuple[TensorSpec, ...]
    flops: int = field(default=0, compare=False)

    @property
    def work(self) -> int:
        """What deadlines and rates are scaled by: operations, else tokens."""
        return self.flops or self.tokens

    def facts(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        """For example ``8192 tokens, giving hidden float16 [8192, 4096]``."""
        given = ", ".join(f"{each.name} {each.dtype} {list(each.shape)}" for each in self.outputs)
        return f"{self.tokens} tokens, giving {given}"


@dataclass(frozen=True)
class ModelPlan(_Agreed):
    """How a group of ``ranks`` will run a model's engine on ``problem``."""

    problem: ModelProblem
    strategy: StrategyName
    ranks: int
    engine_digest: str
    reasons: tuple[str, ...] = ()


AnyProblem = AttentionProblem | ModelProblem
AnyPlan = Plan | ModelPlan


def digest_of(facts: dict[str, Any]) -> int:
    """63 bits of SHA-256 over the canonical JSON of `facts`."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(canonical).digest()[:8], "little") >> 1
