"""Ring attention: K and V shards travel round the group, the next one while one is attended to.

Each rank holds its own shard and two more, whatever the number of ranks: O(S/P) memory. Liu et al.,
Ring Attention with Blockwise Transformers (arXiv 2310.01889); zigzag shares for causal masks after
Zhu, ring-flash-attention.
"""

from __future__ import annotations

from collections.abc import Generator

from mdattn_mpi.devices.protocol import A, Device, P, T
from mdattn_mpi.partition import blocks, partition_of, token_count
from mdattn_mpi.problem import Plan, Span


def attend(
    device: Device[A, T, P], plan: Plan, q: A, k: A, v: A
) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Yields once, with the first shard under way. Returns output and LSE of the query shard.
    """
    problem, owners = plan.problem, partition_of(plan)
    rank, ranks = device.rank, device.ranks
    longest = max(map(token_count, owners.kv))
    buffers = [
        tuple(device.empty((longest, *array.shape[1:]), array) for array in (k, v))
        for _ in range(min(2, ranks - 1))
    ]

    def pass_on(step: int, k: A, v: A) -> tuple[A, A, T]:
        """Send the shard of `step` to the right; receive the next one from the left."""
        tokens = token_count(owners.kv[(rank - step - 1) % ranks])
        next_k, next_v = (buffer[:tokens] for buffer in buffers[step % 2])
        right, left = (rank + 1) % ranks, (rank - 1) % ranks
        transfer = device.exchange(
            send=[(k, right), (v, right)],
            receive=[(next_k, left), (next_v, left)],
        )
        return next_k, next_v, transfer

    coming = pass_on(0, k, v) if ranks > 1 else None
    yield

    merged = Span(0, token_count(owners.query[rank]) if ranks > 1 else 0)
    accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, merged)
    for step in range(ranks):
        shard = owners.kv[(rank - step) % ranks]
        for block in blocks(owners.query[rank], shard, problem.diagonal):
            keys = block.kv.slice
            device.attend(accumulator, block.q, k[keys], v[keys], block.causal)
        if coming:
            k, v, transfer = coming
            device.wait(transfer)  # the shard just attended to has been sent: its buffer is free
            coming = pass_on(step + 1, k, v) if step + 2 < ranks else None
    return device.finish(accumulator)
