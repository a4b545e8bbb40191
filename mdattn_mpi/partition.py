"""Who owns which tokens and heads. Pure arithmetic: no arrays, no ranks that talk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Partition, Plan, Span, StrategyName


def split(length: int, parts: int) -> tuple[Span, ...]:
    """Cut ``[0, length)`` into `parts` runs whose lengths differ by at most one, longer first."""
    short, longer = divmod(length, parts)
    starts = [part * short + min(part, longer) for part in range(parts + 1)]
    return tuple(Span(a, b) for a, b in pairwise(starts))


def shard_length(tokens: int, ranks: int) -> int:
    """``ceil(tokens / ranks)``: the rows of every rank's buffer, where shards must be equal."""
    return -(-tokens // ranks)


def equal_shards(tokens: int, ranks: int) -> tuple[Span, ...]:
    """Give every rank `shard_length` tokens; those at the end get fewer, or none.

    What collectives of equal shards take: filled up at the end, they gather the sequence in order.
    """
    length = shard_length(tokens, ranks)
    starts = [min(rank * length, tokens) for rank in range(ranks + 1)]
    return tuple(Span(a, b) for a, b in pairwise(starts))


def contiguous(tokens: int, ranks: int) -> tuple[tuple[Span, ...], ...]:
    """Give every rank one run, in rank order; shards differ by at most one token."""
    return tuple((span,) for span in split(tokens, ranks))


def zigzag(tokens: int, ranks: int) -> tuple[tuple[Span, ...], ...]:
    """Give rank ``r`` the chunks ``r`` and ``2P-1-r`` of ``2P``.

    Under a causal mask a late token sees more keys than an early one; paired like this all ranks
    have the same work. Shards differ by at most one token.
    """
    chunks = split(tokens, 2 * ranks)
    return tuple((chunks[r], chunks[2 * ranks - 1 - r]) for r in range(ranks))


def equal_partition(problem: AttentionProblem, ranks: int) -> Partition:
    """Cut queries and keys by `equal_shards`, whatever the mask: what TensorRT's engines take."""
    return Partition(
        query=tuple((span,) for span in equal_shards(problem.q_tokens, ranks)),
        kv=tuple((span,) for span in equal_shards(problem.kv_tokens, ranks)),
    )


@lru_cache(1 << 10)
def partition(problem: AttentionProblem, strategy: StrategyName, ranks: int) -> Partition:
    """Choose the owner of every token: zigzag for a causal ring, contiguous otherwise.

    ``allgather`` under a causal mask takes zigzag for the query too, for the same balance; its
    keys stay contiguous, so that gathering them gives the sequence in order.
    """
    if ranks < 1:
        raise RejectedError(f"{ranks} ranks", fix="use at least one rank")

    causal = problem.causal != "none"
    query = zigzag if causal and strategy != "ulysses" else contiguous
    kv = zigzag if causal and strategy == "ring" else contiguous
    return Partition(query(problem.q_tokens, ranks), kv(problem.kv_tokens, ranks))


def partition_of(plan: Plan) -> Partition:
    """Return the partition that `plan` brings, else the one of its strategy."""
    return plan.partition or partition(plan.problem, plan.strategy, plan.ranks)


def token_count(spans: Sequence[Span]) -> int:
    """Count the tokens in all of `spans`."""
    return sum(len(span) for span in spans)


@lru_cache(1 << 12)
def pieces(spans: tuple[Span, ...]) -> tuple[tuple[Span, Span], ...]:
    """Pair each run of a shard with its place in the sequence: ``(local, tokens)``.

    Empty spans are left out; spans that continue the one before are joined to it.
    """
    found: list[tuple[Span, Span]] = []
    local = 0
    for span in filter(len, spans):
        if found and found[-1][1].stop == span.start:
            rows, tokens = found.pop()
            found.append((Span(rows.start, rows.stop + len(span)), Span(tokens.start, span.stop)))
        else:
            found.append((Span(local, local + len(span)), span))
        local += len(span)
    return tuple(found)


@dataclass(frozen=True)
class Block:
    """One rectangle of attention: rows of the rank's query against rows of a kv shard.

    ``q`` and ``kv`` count from the start of the two local arrays. ``causal`` means
    ``lower_right``: with ``m = len(q)`` and ``n = len(kv) >= m``, row ``i`` sees columns
    ``j <= i + n - m``. Every row of a block sees at least one key.
    """

    q: Span
    kv: Span
    causal: bool


@lru_cache(1 << 12)  # the same few again and again, in items of one shape
def blocks(
    query: tuple[Span, ...], kv: tuple[Span, ...], diagonal: int | None
) -> tuple[Block, ...]:
    """Cut "these queries against these keys" into rectangles that any kernel can run.

    Kernels know two masks, none and ``lower_right``; a shard's part of a causal mask is cut so
    that nothing else is needed. Rectangles without a visible key are left out, and neighbours
    are joined, so that a zigzag ring runs one call where one suffices.

    Parameters
    ----------
    query, kv
        The spans of the sequence that the local arrays hold, in local order.
    diagonal
        `AttentionProblem.diagonal`.

    """
    if diagonal is None:
        q_rows, kv_rows = token_count(query), token_count(kv)
        return (Block(Span(0, q_rows), Span(0, kv_rows), False),) if q_rows and kv_rows else ()
    found: list[Block] = []
    for q_local, q in pieces(query):
        row: list[Block] = []
        for kv_local, keys in pieces(kv):
            row.extend(_rectangles(q_local, kv_local, q.start + diagonal - keys.start))
        found.extend(_join(row))
    return tuple(_join(found))


def _rectangles(q: Span, kv: Span, diagonal: int) -> Iterator[Block]:
    """Cut ``q × kv`` under ``j <= i + diagonal`` (both counted inside the block)."""
    first = max(0, -diagonal)  # rows before it see nothing
    full = min(len(q), len(kv) - diagonal)  # all rows after the one before it see everything
    if first < full:
        rows = Span(first, full).shift(q.start)
        yield Block(rows, Span(0, full + diagonal).shift(kv.start), full - first > 1)
    if max(first, full) < len(q):
        yield Block(Span(max(first, full), len(q)).shift(q.start), kv, False)


def _join(found: Sequence[Block]) -> list[Block]:
    """Join neighbours that differ on one side only and touch on the other, the first unmasked."""
    joined: list[Block] = []
    for block in found:
        last = joined[-1] if joined else None
        if last and not last.causal:
            if last.q == block.q and last.kv.stop == block.kv.start:
                joined[-1] = Block(last.q, Span(last.kv.start, block.kv.stop), block.causal)
                continue
            if last.kv == block.kv and last.q.stop == block.q.start and not block.causal:
                joined[-1] = Block(Span(last.q.start, block.q.stop), last.kv, False)
                continue
        joined.append(block)
    return joined


@dataclass(frozen=True)
class HeadShard:
    """The heads that one rank attends to under ``ulysses``.

    ``q`` are the rank's query heads; ``kv`` the kv heads they read. Where ranks outnumber kv
    heads, neighbouring ranks share a kv head. A rank may have no head at all.
    """

    q: Span
    kv: Span


def head_shards(q_heads: int, kv_heads: int, ranks: int) -> tuple[HeadShard, ...]:
    """Give heads to ranks: whole kv heads while they last, then parts of their query groups.

    With at least as many kv heads as ranks, a rank gets whole groups (counts differ by one kv
    head at most). With fewer, each kv head is replicated on its share of the ranks, which split
    its query heads between them.
    """
    group = q_heads // kv_heads
    if kv_heads >= ranks:
        return tuple(
            HeadShard(Span(kv.start * group, kv.stop * group), kv) for kv in split(kv_heads, ranks)
        )
    shards: list[HeadShard] = []
    for head, sharers in enumerate(split(ranks, kv_heads)):
        for part in split(group, len(sharers)):
            q = part.shift(head * group)
            shards.append(HeadShard(q, Span(head, head + 1) if len(q) else Span(head, head)))
    return tuple(shards)
