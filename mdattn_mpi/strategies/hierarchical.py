"""A ring of nodes: each shard comes to a node once, and is gathered by all ranks of the node.

A rank passes the shard that it holds on to the rank at its place in the next node, so that all
ranks of a node share what comes over the network; the node's shards of a step are gathered over
its own links, and attended to in one call. Between nodes a rank sends 1/`node_size` of what it
sends as one of a plain ring, in which every shard crosses every link. After the double ring of Gu
et al., LoongTrain (arXiv 2406.18485), whose inner ring is a gathering here.

All of K and V travel, whatever a mask hides.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import chain

from mdattn_mpi.devices.protocol import A, Device, P, T
from mdattn_mpi.mask import Span
from mdattn_mpi.partition import blocks, common, partition_of, token_count
from mdattn_mpi.problem import Plan


def attend(
    device: Device[A, T, P], plan: Plan, q: A, k: A, v: A, sinks: A | None = None
) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Ranks of a node follow each other, `Plan.node_size` of them. Yields once, with the node's own
    shards under way, and those of the node before. Returns output and LSE of the query shard.
    """
    problem, owners, mask = plan.problem, partition_of(plan), plan.problem.mask
    rank, ranks, size = device.rank, device.ranks, plan.node_size
    nodes, node = ranks // size, range(rank // size * size, rank // size * size + size)
    query = owners.query[rank]

    def shard(place: int, step: int) -> tuple[Span, ...]:
        """Return the tokens that a rank holds at a step: its own first, then of nodes before."""
        return owners.kv[(place - step * size) % ranks]

    def pass_on(step: int, held: tuple[A, A]) -> tuple[tuple[A, A], T]:
        """Send what the rank holds at a step to the next node; receive what it holds then."""
        tokens = token_count(shard(rank, step + 1))
        k, v = (device.empty((tokens, *array.shape[1:]), array) for array in held)
        right, left = (rank + size) % ranks, (rank - size) % ranks
        transfer = device.exchange([(array, right) for array in held], [(k, left), (v, left)])
        return (k, v), transfer

    def gather(step: int, held: tuple[A, A]) -> tuple[tuple[A, A], tuple[Span, ...], T]:
        """Collect what all ranks of the node hold at a step, in the order of the sequence."""
        tokens = tuple(sorted(chain.from_iterable(shard(peer, step) for peer in node)))
        k, v = (device.empty((token_count(tokens), *array.shape[1:]), array) for array in held)
        transfer = device.exchange(
            send=[
                (array[rows.slice], peer)
                for peer in node
                for array in held
                for rows, _ in common(shard(rank, step), tokens)
            ],
            receive=[
                (array[place.slice], peer)
                for peer in node
                for array in (k, v)
                for _, place in common(shard(peer, step), tokens)
            ],
        )
        return (k, v), tokens, transfer

    coming = pass_on(0, (k, v)) if nodes > 1 else None
    gathering = gather(0, (k, v))
    yield

    merged = Span(0, token_count(query) if nodes > 1 or problem.sinks else 0)
    accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, problem.softcap, merged)
    for step in range(nodes):
        gathered, tokens, transfer = gathering
        device.wait(transfer)
        if coming:
            held, transfer = coming
            device.wait(transfer)
            gathering = gather(step + 1, held)
            coming = pass_on(step + 1, held) if step + 2 < nodes else None
        device.attend(accumulator, blocks(query, tokens, mask), *gathered)
    return device.finish(accumulator, sinks)
