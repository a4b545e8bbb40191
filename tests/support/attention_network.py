"""A network of attention on P ranks: what every rank feeds to it, and what must come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mdattn_mpi.partition import equal_partition
from mdattn_mpi.problem import AttentionProblem, StrategyName
from mdattn_mpi.trt.versions import Form
from tests.support.network_interpreter import Ranks, ThreadRanks, interpret, padded, recorded
from tests.support.network_interpreter import shards as cut
from tests.support.tensorrt import library

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # what rounding moves a value of 1 by, at most

Execute = Callable[[dict[str, Any], Ranks], dict[str, Any]]


def attend(problem: AttentionProblem, q: Any, k: Any, v: Any) -> Any:
    """Attention in float64, written once more: whole sequences, one head at a time."""
    out = np.zeros((problem.q_tokens, problem.q_heads, problem.v_head_dim))
    for head in range(problem.q_heads):
        kv = head // problem.group_heads
        scores = problem.scale * q[:, head].astype(float) @ k[:, kv].astype(float).T
        if problem.diagonal is not None:
            i, j = np.ogrid[: problem.q_tokens, : problem.kv_tokens]
            scores[j > i + problem.diagonal] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv].astype(float)
    return out


def draw(problem: AttentionProblem, seed: int) -> tuple[Any, Any, Any]:
    """Draw query, key and value ``[S, N, H]``."""
    random = np.random.default_rng(seed)
    dtype = DTYPES[problem.dtype]

    def tokens(count: int, heads: int) -> Any:
        return random.standard_normal((count, heads, problem.head_dim)).astype(dtype)

    return (
        tokens(problem.q_tokens, problem.q_heads),
        tokens(problem.kv_tokens, problem.kv_heads),
        tokens(problem.kv_tokens, problem.kv_heads),
    )


class AttentionNetwork:
    """The network for a problem, as TensorRT's builder would get it.

    Parameters
    ----------
    problem, strategy, ranks
        What is computed.
    others
        Problems that the network has to take as well, by one profile.
    form
        See `mdattn_mpi.trt.networks.define`.

    """

    def __init__(
        self,
        problem: AttentionProblem,
        strategy: StrategyName,
        ranks: int,
        others: Sequence[AttentionProblem] = (),
        seed: int = 0,
        form: Form | None = None,
    ) -> None:
        from mdattn_mpi.trt.choice import spec_for
        from mdattn_mpi.trt.networks import define

        self.problem, self.strategy, self.ranks = problem, strategy, ranks
        self.api = library().api
        (own,) = spec_for((problem,), strategy, ranks)
        specs = spec_for((problem, *others), strategy, ranks)
        (spec,) = [each for each in specs if each.includes(own)]
        self._builder = self.api.Builder(self.api.Logger(self.api.Logger.ERROR))
        with recorded(self.api) as collectives:
            self.network = define(library(), self._builder, spec, form)
        self.collectives = collectives
        # What the inspector must find.
        assert Counter(collectives.values()) == spec.collectives
        self._drawn = draw(problem, seed)

    @property
    def expected(self) -> Any:
        """What must come out, in float64."""
        return attend(self.problem, *self._drawn)

    def inputs(self, rank: int) -> dict[str, Any]:
        """What a rank feeds: its shards, filled up with what must not count."""
        from mdattn_mpi.trt.networks import NETWORKS

        shapes = NETWORKS[self.strategy].shapes(self.problem, self.ranks, rank)
        parts = equal_partition(self.problem, self.ranks)
        q, k, v = self._drawn
        return {
            "query": padded(cut(q, parts.query, rank), shapes.q),
            "key": padded(cut(k, parts.kv, rank), shapes.kv),
            "value": padded(cut(v, parts.kv, rank), shapes.kv),
            "keys": np.array([shapes.keys], np.int64),
        }

    def interpret(self, inputs: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
        """Execute it on this rank in the interpreter."""
        return interpret(self.api, self.network, inputs, ranks, self.collectives)

    def run(self, execute: Execute) -> Any:
        """Execute it on all ranks; put their outputs together, in float64."""
        parts = equal_partition(self.problem, self.ranks)

        def one(group: ThreadRanks) -> Any:
            inputs = self.inputs(group.rank)
            output = execute(inputs, group)["output"]
            assert output.shape == inputs["query"].shape
            return output[: sum(map(len, parts.query[group.rank]))]

        return np.concatenate(ThreadRanks.run(self.ranks, one)).astype(np.float64)
