"""Every rank collects all of K and V, then attends once: nothing to merge, nothing rounded twice.

The gathering needs nothing computed, so in a batch it runs while the item before computes. It takes
memory for all of K and V on every rank.

An item that stands alone has nothing to hide its gathering behind but itself. With a head start,
the last rows of the query attend to the rank's own keys meanwhile, and their two results are
merged: faster, and for these rows no more exact than `ring`.
"""

from __future__ import annotations

from collections.abc import Generator

from mdattn_mpi.devices.protocol import A, Device, P, T
from mdattn_mpi.mask import Span
from mdattn_mpi.partition import blocks, common, partition_of, seen, token_count, tokens_of
from mdattn_mpi.problem import Plan


def attend(
    device: Device[A, T, P],
    plan: Plan,
    q: A,
    k: A,
    v: A,
    sinks: A | None = None,
    *,
    head_start: int = 0,
) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Yields once, with all of K and V under way that the rank sees. Returns output and LSE of the
    query shard.

    Parameters
    ----------
    head_start
        How many rows of the rank's query attend to its own keys while the others are on their way.

    """
    problem, owners, mask = plan.problem, partition_of(plan), plan.problem.mask
    everyone, sequence = range(device.ranks), (Span(0, problem.kv_tokens),)
    query, own = owners.query[device.rank], owners.kv[device.rank]
    wanted = [seen(spans, sequence, mask) for spans in owners.query]  # tokens, of each rank
    visible = wanted[device.rank]
    shards, tokens = (k, v), token_count(visible)
    gathered = tuple(device.empty((tokens, *array.shape[1:]), array) for array in shards)
    # Received in the order of the sequence, whoever owns what.
    gathering = device.exchange(
        send=[
            (shard[rows.slice], peer)
            for peer in everyone
            for shard in shards
            for rows, _ in common(own, wanted[peer])
        ],
        receive=[
            (whole[place.slice], peer)
            for peer in everyone
            for whole in gathered
            for _, place in common(owners.kv[peer], visible)
        ],
    )
    yield

    last = token_count(query)
    early = Span(max(0, last - head_start), last)
    merged = Span(0, last) if problem.sinks else early
    accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, problem.softcap, merged)

    def attend_to(rows: Span, keys: tuple[Span, ...], k: A, v: A) -> None:
        """Let some of the rank's rows see `keys`, which `k` and `v` hold one after the other."""
        found = blocks(tokens_of(query, (rows,)), keys, mask)
        placed = [block._replace(q=block.q.shift(rows.start)) for block in found]
        device.attend(accumulator, placed, k, v)

    all_k, all_v = gathered
    attend_to(early, own, k, v)
    device.wait(gathering)
    for rest in _complement(own, problem.kv_tokens) if len(early) else ():
        for _, place in common((rest,), visible):
            run = tokens_of(visible, (place,))
            attend_to(early, run, all_k[place.slice], all_v[place.slice])
    attend_to(Span(0, early.start), visible, all_k, all_v)
    return device.finish(accumulator, sinks)


def _complement(spans: tuple[Span, ...], tokens: int) -> list[Span]:
    """Return the runs of the sequence that are in none of `spans`."""
    found, start = [], 0
    for span in (*sorted(spans), Span(tokens, tokens)):
        if start < span.start:
            found.append(Span(start, span.start))
        start = max(start, span.stop)
    return found
