"""Collect all of K and V on every rank, then attend once."""

from __future__ import annotations

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.partition import equal_shards, shard_length
from mdattn_mpi.problem import AttentionProblem, Causal
from mdattn_mpi.trt.networks.draft import Draft
from mdattn_mpi.trt.spec import Shapes


def refuse(problem: AttentionProblem, ranks: int) -> None:
    """Refuse a mask of which a rank's part is no ``lower_right``."""
    if problem.causal == "upper_left" and problem.q_tokens > problem.kv_tokens:
        raise RejectedError(
            f"upper_left with {problem.q_tokens} queries over {problem.kv_tokens} keys: some "
            "ranks' part of the mask bends",
            fix="use -s ulysses, or -b cuda",
        )


def mask(problem: AttentionProblem) -> Causal:
    """Align the mask with the last key that a rank's last query sees."""
    return "none" if problem.causal == "none" else "lower_right"


def shapes(problem: AttentionProblem, ranks: int, rank: int) -> Shapes:
    """Give every rank its own queries, and the keys up to what its last query sees.

    Queries aren't exchanged, so they need no filling up; a rank without any brings one row.
    """
    queries = equal_shards(problem.q_tokens, ranks)[rank]
    keys = problem.kv_tokens
    if problem.diagonal is not None and len(queries):
        keys = queries.stop + problem.diagonal
    return Shapes(max(1, len(queries)), shard_length(problem.kv_tokens, ranks), keys)


def define(draft: Draft) -> None:
    """Two collectives and one attention."""
    query = draft.query()
    gathered = (draft.collective(tensor, "ALL_GATHER") for tensor in draft.key_and_value())
    key, value = draft.first_keys(*gathered)
    draft.output(draft.attention(query, key, value))
