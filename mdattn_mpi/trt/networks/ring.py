"""TensorRT's multi-device attention: K and V stay where they are; the layer passes them round."""

from __future__ import annotations

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.partition import shard_length
from mdattn_mpi.problem import AttentionProblem, Causal
from mdattn_mpi.trt.networks.draft import Draft
from mdattn_mpi.trt.spec import Shapes


def refuse(problem: AttentionProblem, ranks: int) -> None:
    """Refuse a mask and unequal shards: ``num_ranks`` takes neither."""
    if ranks == 1:
        return
    if problem.causal != "none":
        raise RejectedError(
            f"{problem.causal} on {ranks} ranks: TensorRT's multi-device attention has no mask",
            fix="use -s allgather or -s ulysses, or -b cuda -s ring",
        )
    for name, tokens in (("query", problem.q_tokens), ("key", problem.kv_tokens)):
        if tokens % ranks:
            raise RejectedError(
                f"{tokens} {name} tokens on {ranks} ranks: TensorRT's multi-device attention "
                "takes equal shards",
                fix="use -s allgather or -s ulysses, or -b cuda -s ring",
            )


def mask(problem: AttentionProblem) -> Causal:
    """Take the problem's mask: there is none but on one rank."""
    return problem.causal


def shapes(problem: AttentionProblem, ranks: int, rank: int) -> Shapes:
    """Give every rank its own shards."""
    kv = shard_length(problem.kv_tokens, ranks)
    return Shapes(shard_length(problem.q_tokens, ranks), kv, kv)


def define(draft: Draft) -> None:
    """One layer: attention with ``num_ranks``."""
    query = draft.query()
    key, value = draft.key_and_value()
    draft.output(draft.attention(query, key, value, ring_ranks=draft.spec.ranks))
