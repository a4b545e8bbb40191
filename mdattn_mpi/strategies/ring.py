"""Ring attention: K and V shards travel round the group, the next one while one is attended to.

Each rank holds its own shard and two more, whatever the number of ranks: O(S/P) memory. Liu et al.,
Ring Attention with Blockwise Transformers (arXiv 2310.01889); zigzag shares for causal masks after
Zhu, ring-flash-attention.

Where a window or documents hide most keys from most ranks, nothing travels on: at each step every
owner sends a rank further along just what that one sees of its shard.
"""

from __future__ import annotations

from collections.abc import Generator

from mdattn_mpi.devices.protocol import A, Device, P, T
from mdattn_mpi.mask import Span
from mdattn_mpi.partition import blocks, partition_of, pieces, seen, token_count, tokens_of
from mdattn_mpi.problem import Plan


def attend(
    device: Device[A, T, P], plan: Plan, q: A, k: A, v: A, sinks: A | None = None
) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Yields once, with the first shard under way. Returns output and LSE of the query shard.
    """
    problem, owners, mask = plan.problem, partition_of(plan), plan.problem.mask
    rank, ranks = device.rank, device.ranks
    own = (k, v)

    def part(owner: int, receiver: int) -> tuple[Span, ...]:
        """Return the rows of a shard that `receiver` is sent."""
        if mask.hides_keys:
            return seen(owners.query[receiver], owners.kv[owner], mask)
        return (Span(0, token_count(owners.kv[owner])),)

    longest = max((token_count(part(r, rank)) for r in range(ranks) if r != rank), default=0)
    buffers = [
        (device.empty((longest, *k.shape[1:]), k), device.empty((longest, *v.shape[1:]), v))
        for _ in range(min(2, ranks - 1))
    ]

    def pass_on(step: int, held: tuple[A, A]) -> tuple[tuple[A, A], tuple[Span, ...], T]:
        """Send a rank to the right what is for it; receive what comes after `step`."""
        far = step + 1 if mask.hides_keys else 1
        right, left = (rank + far) % ranks, (rank - far) % ranks
        sent, next_owner = (rank - step - 1 + far) % ranks, (rank - step - 1) % ranks
        rows = part(next_owner, rank)
        tokens = token_count(rows)
        coming = buffers[step % 2][0][:tokens], buffers[step % 2][1][:tokens]
        transfer = device.exchange(
            send=[(array[run.slice], right) for array in held for run in part(sent, right)],
            receive=[(array[to.slice], left) for array in coming for to, _ in pieces(rows)],
        )
        return coming, tokens_of(owners.kv[next_owner], rows), transfer

    coming = pass_on(0, own) if ranks > 1 else None
    yield

    merged = Span(0, token_count(owners.query[rank]) if ranks > 1 or problem.sinks else 0)
    accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, problem.softcap, merged)
    held, tokens = own, owners.kv[rank]
    for step in range(ranks):
        for block in blocks(owners.query[rank], tokens, mask):
            keys, values = (array[block.kv.slice] for array in held)
            device.attend(accumulator, block.q, keys, values, block.band)
        if coming:
            held, tokens, transfer = coming
            device.wait(transfer)  # the shard just attended to has been sent: its buffer is free
            source = own if mask.hides_keys else held
            coming = pass_on(step + 1, source) if step + 2 < ranks else None
    return device.finish(accumulator, sinks)
