"""Every rank collects all of K and V, then attends once: nothing to merge, nothing rounded twice.

The gathering needs nothing computed, so in a batch it runs while the item before computes. It takes
memory for all of K and V on every rank.

An item that stands alone has nothing to hide its gathering behind but itself. With a head start,
the last rows of the query attend to the rank's own keys meanwhile, and their two results are
merged: faster, and for these rows no more exact than `ring`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from mdattn_mpi.devices.protocol import A, Device, P, T
from mdattn_mpi.partition import blocks, partition_of, pieces, token_count
from mdattn_mpi.problem import Plan, Span


def attend(
    device: Device[A, T, P], plan: Plan, q: A, k: A, v: A, *, head_start: int = 0
) -> Generator[None, None, tuple[A, A]]:
    """Collective. Attend with the rank's shards; see `mdattn_mpi.strategies`.

    Yields once, with all of K and V under way. Returns output and LSE of the query shard.

    Parameters
    ----------
    head_start
        How many rows of the rank's query attend to its own keys while the others are on their way.

    """
    problem, owners = plan.problem, partition_of(plan)
    everyone = range(device.ranks)
    shards, held = (k, v), [pieces(spans) for spans in owners.kv]
    wholes = tuple(device.empty((problem.kv_tokens, *array.shape[1:]), array) for array in shards)
    # Received in the order of the sequence, whoever owns what.
    gathering = device.exchange(
        send=[
            (shard[rows.slice], peer)
            for peer in everyone
            for shard in shards
            for rows, _ in held[device.rank]
        ],
        receive=[
            (whole[tokens.slice], peer)
            for peer in everyone
            for whole in wholes
            for _, tokens in held[peer]
        ],
    )
    yield

    all_k, all_v = wholes
    query, own = owners.query[device.rank], owners.kv[device.rank]
    last = token_count(query)
    early = Span(max(0, last - head_start), last)
    accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, early)

    def attend_to(rows: Span, keys: Sequence[Span], k: A, v: A) -> None:
        """Let some of the rank's rows see `keys`, which `k` and `v` hold one after the other."""
        for block in blocks(_cut(query, rows), keys, problem.diagonal):
            run = block.kv.slice
            device.attend(accumulator, block.q.shift(rows.start), k[run], v[run], block.causal)

    attend_to(early, own, k, v)
    device.wait(gathering)
    for rest in _complement(own, problem.kv_tokens):
        attend_to(early, (rest,), all_k[rest.slice], all_v[rest.slice])
    attend_to(Span(0, early.start), (Span(0, problem.kv_tokens),), all_k, all_v)
    return device.finish(accumulator)


def _cut(spans: Sequence[Span], rows: Span) -> tuple[Span, ...]:
    """Return the tokens of local `rows`, where `spans` lie one after the other."""
    found: list[Span] = []
    local = 0
    for span in spans:
        start = max(0, rows.start - local)
        stop = min(len(span), rows.stop - local)
        if start < stop:
            found.append(Span(span.start + start, span.start + stop))
        local += len(span)
    return tuple(found)


def _complement(spans: Sequence[Span], tokens: int) -> list[Span]:
    """Return the runs of the sequence that are in none of `spans`."""
    found, start = [], 0
    for span in (*sorted(spans), Span(tokens, tokens)):
        if start < span.start:
            found.append(Span(start, span.start))
        start = max(start, span.stop)
    return found
