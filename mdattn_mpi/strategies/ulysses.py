"""All-to-all from a token shard of all heads to all tokens of some heads, attend, and back.

Each rank attends like a single device, so nothing is merged and any mask is a plain one. Kv heads
fewer than ranks are replicated; a rank without heads takes part in the exchanges alone. Jacobs et
al., DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from mdattn_mpi.devices.protocol import A, Device, Message, P, T
from mdattn_mpi.mask import Span
from mdattn_mpi.partition import blocks, head_shards, partition_of, pieces, token_count
from mdattn_mpi.problem import Plan

Owners = Sequence[Sequence[Span]]  # the tokens of each rank
Heads = Sequence[Span]  # the heads of each rank


def attend(
    device: Device[A, T, P], plan: Plan, q: A, k: A, v: A, sinks: A | None = None
) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Yields once, with all tokens of the rank's heads under way. Returns output and LSE of the query
    shard.
    """
    problem, owners = plan.problem, partition_of(plan)
    heads = head_shards(problem.q_heads, problem.kv_heads, device.ranks)
    q_heads, kv_heads = [shard.q for shard in heads], [shard.kv for shard in heads]
    (all_q, all_k, all_v), gathering = _gather_tokens(
        device, ((q, owners.query, q_heads), (k, owners.kv, kv_heads), (v, owners.kv, kv_heads))
    )
    yield

    device.wait(gathering)
    merged = Span(0, problem.q_tokens if problem.sinks else 0)
    options = problem.v_head_dim, problem.scale, problem.softcap, merged
    accumulator = device.accumulator(all_q, *options)
    own_heads = q_heads[device.rank]
    if len(own_heads):
        queries, keys = (Span(0, problem.q_tokens),), (Span(0, problem.kv_tokens),)
        device.attend(accumulator, blocks(queries, keys, problem.mask), all_k, all_v)
    out, lse = device.finish(accumulator, sinks[own_heads.slice] if sinks is not None else None)
    return _gather_heads(device, (out, lse), owners.query, q_heads)


def _gather_tokens(
    device: Device[A, T, P], shards: Sequence[tuple[A, Owners, Heads]]
) -> tuple[list[A], T]:
    """Collective. Start turning some tokens of all heads into all tokens of some heads."""
    wholes: list[A] = []
    send: list[Message[A]] = []
    receive: list[Message[A]] = []
    for shard, owners, heads in shards:
        tokens = sum(map(token_count, owners))
        whole = device.empty((tokens, len(heads[device.rank]), *shard.shape[2:]), shard)
        wholes.append(whole)
        others = (some for peer, some in enumerate(heads) if peer != device.rank)
        packed = {some: _pack(device, shard, some) for some in dict.fromkeys(others)}
        for peer, some in enumerate(heads):
            part = shard[:, some.slice] if peer == device.rank else packed[some]
            send += [(part[rows.slice], peer) for rows, _ in pieces(owners[device.rank])]
            receive += [(whole[run.slice], peer) for _, run in pieces(owners[peer])]
    return wholes, device.exchange(send, receive)


def _pack(device: Device[A, T, P], shard: A, heads: Span) -> A:
    """Copy some heads into an array of their own, for only what is contiguous can be sent."""
    part = device.empty((shard.shape[0], len(heads), *shard.shape[2:]), shard)
    device.copy(shard[:, heads.slice], part)
    return part


def _gather_heads(
    device: Device[A, T, P], wholes: tuple[A, A], owners: Owners, heads: Heads
) -> tuple[A, A]:
    """Collective. Turn all tokens of some heads back into some tokens of all heads."""
    own = pieces(owners[device.rank])
    tokens, count = token_count(owners[device.rank]), sum(map(len, heads))
    out, lse = (device.empty((tokens, count, *whole.shape[2:]), whole) for whole in wholes)
    parts = [
        [device.empty((tokens, len(some), *whole.shape[2:]), whole) for whole in wholes]
        if peer != device.rank
        else [out[:, some.slice], lse[:, some.slice]]
        for peer, some in enumerate(heads)
    ]
    returning = device.exchange(
        send=[
            (whole[run.slice], peer)
            for peer, runs in enumerate(owners)
            for whole in wholes
            for _, run in pieces(runs)
        ],
        receive=[
            (part[rows.slice], peer)
            for peer, from_peer in enumerate(parts)
            for part in from_peer
            for rows, _ in own
        ],
    )
    device.wait(returning)
    for peer, (some, from_peer) in enumerate(zip(heads, parts, strict=True)):
        if peer != device.rank:
            for part, shard in zip(from_peer, (out, lse), strict=True):
                device.copy(part, shard[:, some.slice])
    return out, lse
