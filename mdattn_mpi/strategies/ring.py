"""Ring attention: K and V shards travel round the group, the next one while one is attended to.

Each rank holds its own shard and two more, whatever the number of ranks: O(S/P) memory. Liu et al.,
Ring Attention with Blockwise Transformers (arXiv 2310.01889); zigzag shares for causal masks after
Zhu, ring-flash-attention.

Under a causal mask a shard loses on its way what nobody further along sees, and travels in the
direction in which that is more. Zigzag shards go down the ranks: those below the owner see all of
it, those above, which come after them, only its first chunk.

Where a window or documents hide most keys from most ranks, nothing travels on: at each step every
owner sends a rank further along just what that one sees of its shard.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import lru_cache
from typing import NamedTuple

from mdattn_mpi.devices.protocol import A, Device, P, T
from mdattn_mpi.mask import Mask, Span
from mdattn_mpi.partition import blocks, common, partition_of, pieces, seen, token_count, tokens_of
from mdattn_mpi.problem import Partition, Plan


def attend(
    device: Device[A, T, P], plan: Plan, q: A, k: A, v: A, sinks: A | None = None
) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Yields once, with the first shard under way. Returns output and LSE of the query shard.
    """
    problem, owners, mask = plan.problem, partition_of(plan), plan.problem.mask
    rank, ranks = device.rank, device.ranks
    own, hops = (k, v), route(owners, mask, rank)

    longest = max((token_count(hop.tokens) for hop in hops), default=0)
    buffers = [
        (device.empty((longest, *k.shape[1:]), k), device.empty((longest, *v.shape[1:]), v))
        for _ in range(min(2, len(hops)))
    ]

    def pass_on(step: int, held: tuple[A, A]) -> tuple[tuple[A, A], tuple[Span, ...], T]:
        """Send the next rank what is for it; receive what comes after `step`."""
        hop, (keys, values) = hops[step], buffers[step % 2]
        tokens = token_count(hop.tokens)
        coming = keys[:tokens], values[:tokens]
        transfer = device.exchange(
            send=[(array[rows.slice], hop.target) for array in held for rows in hop.sent],
            receive=[(array[rows.slice], hop.source) for array in coming for rows in hop.received],
        )
        return coming, hop.tokens, transfer

    coming = pass_on(0, own) if hops else None
    yield

    merged = Span(0, token_count(owners.query[rank]) if hops or problem.sinks else 0)
    accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, problem.softcap, merged)
    held, tokens = own, owners.kv[rank]
    for step in range(ranks):
        device.attend(accumulator, blocks(owners.query[rank], tokens, mask), *held)
        if coming:
            held, tokens, transfer = coming
            device.wait(transfer)  # the shard just attended to has been sent: its buffer is free
            source = own if mask.hides_keys else held
            coming = pass_on(step + 1, source) if step + 1 < len(hops) else None
    return device.finish(accumulator, sinks)


class Hop(NamedTuple):
    """What a rank sends and receives in one step.

    Attributes
    ----------
    target, sent
        To whom, and which rows of what the rank holds.
    source, received, tokens
        From whom, into which rows of a buffer, and which tokens these are.

    """

    target: int
    sent: tuple[Span, ...]
    source: int
    received: tuple[Span, ...]
    tokens: tuple[Span, ...]


@lru_cache(1 << 10)
def route(owners: Partition, mask: Mask, rank: int) -> tuple[Hop, ...]:
    """Say what a rank sends and receives in each step but the last."""
    ranks = len(owners.kv)
    latest = [max((span.stop for span in spans if len(span)), default=0) for spans in owners.query]
    way = _direction(owners, mask)

    def part(owner: int, receiver: int) -> tuple[Span, ...]:
        """Return the rows of a shard that `receiver` is sent: those that it sees, or passes on."""
        viewer = receiver
        if not mask.hides_keys:  # then whoever has the latest query sees what the others see
            further = range((owner - receiver) * way % ranks)
            viewer = max(
                ((receiver + far * way) % ranks for far in further), key=latest.__getitem__
            )
        return seen(owners.query[viewer], owners.kv[owner], mask)

    hops = []
    for step in range(ranks - 1):
        far, travelled = (step + 1, 0) if mask.hides_keys else (1, step)
        target, source = (rank + far * way) % ranks, (rank - far * way) % ranks
        owner, coming_owner = (rank - travelled * way) % ranks, (source - travelled * way) % ranks
        held = part(owner, rank) if travelled else (Span(0, token_count(owners.kv[rank])),)
        sent = tuple(rows for _, rows in common(part(owner, target), held))
        coming = part(coming_owner, rank)
        received = tuple(rows for rows, _ in pieces(coming))
        hops.append(Hop(target, sent, source, received, tokens_of(owners.kv[coming_owner], coming)))
    return tuple(hops)


def _direction(owners: Partition, mask: Mask) -> int:
    """Return 1 if shards travel up the ranks, -1 if down: first to those who see more of them."""
    first, last = 0, len(owners.kv) - 1

    def hidden(viewer: int, owner: int) -> int:
        shown = token_count(seen(owners.query[viewer], owners.kv[owner], mask))
        return token_count(owners.kv[owner]) - shown

    down = hidden(first, last) < hidden(last, first)
    return -1 if down and not mask.hides_keys else 1
