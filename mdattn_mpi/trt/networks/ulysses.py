"""Trade tokens for heads, attend to all tokens of some heads, trade back."""

from __future__ import annotations

from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.partition import shard_length
from mdattn_mpi.problem import AttentionProblem, Causal
from mdattn_mpi.trt.networks.draft import Draft
from mdattn_mpi.trt.spec import Shapes


def refuse(problem: AttentionProblem, ranks: int) -> None:
    """Refuse heads that can't be dealt evenly, and a diagonal that filling up would move."""
    if problem.q_heads % ranks:
        raise RejectedError(
            f"{problem.q_heads} query heads don't divide among {ranks} ranks",
            fix="use -s allgather, or -b cuda -s ulysses, which deals them unevenly",
        )
    if problem.kv_heads % ranks and ranks % problem.kv_heads:
        raise RejectedError(
            f"{problem.kv_heads} kv heads can't be dealt or repeated evenly among {ranks} ranks",
            fix="use -s allgather, or -b cuda -s ulysses, which deals them unevenly",
        )
    if mask(problem) == "lower_right" and _filler(problem.q_tokens, ranks) > _filler(
        problem.kv_tokens, ranks
    ):
        raise RejectedError(
            f"lower_right with {problem.q_tokens} queries over {problem.kv_tokens} keys on "
            f"{ranks} ranks: filling up to equal shards would move the diagonal",
            fix="use -s allgather, or -b cuda",
        )


def _filler(tokens: int, ranks: int) -> int:
    """Count the rows that fill `tokens` up to equal shards."""
    return shard_length(tokens, ranks) * ranks - tokens


def mask(problem: AttentionProblem) -> Causal:
    """Take the problem's mask; with equal lengths the one that rows at the end don't move."""
    return "upper_left" if problem.diagonal == 0 else problem.causal


def shapes(problem: AttentionProblem, ranks: int, rank: int) -> Shapes:
    """Fill all shards up to equal length; `keys` leaves the rows at the end out.

    ``lower_right`` counts from the end, so there every row that fills up the query takes one key
    more along, which no query of the problem sees.
    """
    keys = problem.kv_tokens
    if mask(problem) == "lower_right":
        keys += _filler(problem.q_tokens, ranks)
    return Shapes(
        shard_length(problem.q_tokens, ranks), shard_length(problem.kv_tokens, ranks), keys
    )


def define(draft: Draft) -> None:
    """Trade, attend, trade back."""
    query = draft.heads_to_ranks(draft.query())
    traded = (draft.heads_to_ranks(_repeat(draft, tensor)) for tensor in draft.key_and_value())
    key, value = draft.first_keys(*traded)
    draft.output(draft.tokens_to_ranks(draft.attention(query, key, value)))


def _repeat(draft: Draft, tensor: Any) -> Any:
    """Bring a kv head to every rank whose query heads read it, where ranks outnumber them."""
    spec = draft.spec
    if spec.kv_heads % spec.ranks == 0:
        return tensor
    heads = [rank * spec.kv_heads // spec.ranks for rank in range(spec.ranks)]
    return draft.pick_heads(tensor, heads)
