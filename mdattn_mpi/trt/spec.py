"""What an attention engine is made for: the key of its cache, and the shapes it takes.

TensorRT's collectives gather and scatter equal shards. So a rank owns ``ceil(S / P)`` tokens, and
the ranks at the end fewer or none; their buffers are filled up, and the engine is told at run time
how many of the collected keys count (input ``keys``). The same input carries the causal mask of
``allgather``: a rank sees the keys up to its last query.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from mdattn_mpi.problem import Causal, DTypeName, StrategyName


@dataclass(frozen=True)
class Extent:
    """One dim of an optimization profile: the lengths that it takes, tuned for `opt`."""

    min: int
    opt: int
    max: int

    @staticmethod
    def over(lengths: Iterable[int]) -> Extent:
        """Cover `lengths`, tuned for the longest, where the time goes."""
        found = sorted(lengths)
        return Extent(found[0], found[-1], found[-1])

    @property
    def static(self) -> bool:
        """Whether there is only one length."""
        return self.min == self.max

    def covers(self, other: Extent) -> bool:
        """Whether every length of `other` can run."""
        return self.min <= other.min and other.max <= self.max


class Shapes(NamedTuple):
    """What one rank hands to the engine for one problem: rows of its buffers.

    ``q`` and ``kv`` are tokens of the query's and of key's and value's buffer, filled up where
    TensorRT needs equal shards; ``keys`` is how many of the collected keys count.
    """

    q: int
    kv: int
    keys: int


@dataclass(frozen=True)
class EngineSpec:
    """Everything that makes one attention engine different from another.

    ``mask`` is what the engine's attention layer does, which is not always the problem's.
    """

    strategy: StrategyName
    ranks: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: DTypeName
    mask: Causal
    scale: float
    q: Extent
    kv: Extent
    keys: Extent

    @property
    def takes_keys(self) -> bool:
        """Whether the engine has the input ``keys``; without it all collected keys count."""
        if self.strategy == "ring":
            return False
        return not (self.keys.static and self.kv.static and self.keys.max == self.collected.max)

    @property
    def collected(self) -> Extent:
        """Keys that the attention layer could see."""
        times = 1 if self.strategy == "ring" else self.ranks
        return Extent(self.kv.min * times, self.kv.opt * times, self.kv.max * times)

    @property
    def collectives(self) -> dict[str, int]:
        """How many of which ``CollectiveOperation`` the network has."""
        if self.ranks == 1:
            return {}
        return {"ring": {}, "allgather": {"ALL_GATHER": 2}, "ulysses": {"ALL_TO_ALL": 4}}[
            self.strategy
        ]

    def includes(self, other: EngineSpec) -> bool:
        """Whether an engine of this spec does all that one of `other` would."""
        return (
            self.q.covers(other.q)
            and self.kv.covers(other.kv)
            and self.keys.covers(other.keys)
            and self == replace(other, q=self.q, kv=self.kv, keys=self.keys)
        )

    def facts(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the fields, in hex."""
        canonical = json.dumps(self.facts(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @staticmethod
    def from_facts(facts: dict[str, Any]) -> EngineSpec:
        """Make it from what `facts` gave; raise TypeError or KeyError when these aren't."""
        extents = {name: Extent(**facts[name]) for name in ("q", "kv", "keys")}
        return EngineSpec(**{**facts, **extents})

    def __str__(self) -> str:
        """For example ``ring on 4 ranks, 8/2 heads of 128, float16, 1–8192 tokens a rank``."""
        length = f"{self.q.max}" if self.q.static else f"{self.q.min}–{self.q.max}"
        mask = "" if self.mask == "none" else f", {self.mask}"
        return (
            f"{self.strategy} on {self.ranks} ranks, {self.q_heads}/{self.kv_heads} heads of "
            f"{self.head_dim}, {self.dtype}{mask}, {length} tokens a rank"
        )


def any_length(spec: EngineSpec) -> EngineSpec:
    """Take every length up to the longest of `spec`: what lies between isn't known."""
    q, kv, keys = spec.q.max, spec.kv.max, spec.collected.max
    return replace(
        spec, q=Extent(1, q, q), kv=Extent(1, kv, kv), keys=Extent(1, spec.keys.opt, keys)
    )
