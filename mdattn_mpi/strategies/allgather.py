"""Every rank collects all of K and V, then attends once: nothing to merge, nothing rounded twice.

The gathering needs nothing computed, so in a batch it runs while the item before computes. It takes
memory for all of K and V on every rank.
"""

from __future__ import annotations

from collections.abc import Generator

from mdattn_mpi.devices.protocol import A, Device, Message
from mdattn_mpi.partition import blocks, partition_of, pieces
from mdattn_mpi.problem import Plan, Span


def attend(device: Device[A], plan: Plan, q: A, k: A, v: A) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Yields once, with all of K and V under way. Returns output and LSE of the query shard.
    """
    problem, owners = plan.problem, partition_of(plan)
    everyone = range(device.ranks)
    shards = (k, v)
    wholes = tuple(device.empty((problem.kv_tokens, *array.shape[1:]), array) for array in shards)
    # Received in the order of the sequence, whoever owns what.
    gathering = device.exchange(
        send=[
            Message(shard[rows.slice], peer)
            for peer in everyone
            for shard in shards
            for rows, _ in pieces(owners.kv[device.rank])
        ],
        receive=[
            Message(whole[tokens.slice], peer)
            for peer in everyone
            for whole in wholes
            for _, tokens in pieces(owners.kv[peer])
        ],
    )
    yield

    device.wait(gathering)
    accumulator = device.accumulator(q, problem.v_head_dim, problem.scale)
    all_k, all_v = wholes
    sequence = (Span(0, problem.kv_tokens),)
    for block in blocks(owners.query[device.rank], sequence, problem.diagonal):
        keys = block.kv.slice
        device.attend(accumulator, block.q, all_k[keys], all_v[keys], block.causal)
    return device.finish(accumulator)
