"""Who owns which tokens and heads. Pure arithmetic: no arrays, no ranks that talk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import FULL, LOWER_RIGHT, MAX_RUNS, Band, Mask, Span
from mdattn_mpi.problem import AttentionProblem, Partition, Plan, StrategyName

EVEN = 1.01  # the busiest rank's work, of the mean's: nothing is gained by more cuts


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
    """Choose the owner of every token, so that all ranks have as many, and as much work.

    Contiguous without a mask, zigzag under a causal one. `allgather` then keeps the keys
    contiguous, so that gathering them gives the sequence in order. Where a window or documents hide
    keys, a rank owns the keys of its own queries, most of which it sees: contiguous if that is
    even, else by `even_shares`.
    """
    if ranks < 1:
        raise RejectedError(f"{ranks} ranks", fix="use at least one rank")

    tokens, kv_tokens = problem.q_tokens, problem.kv_tokens
    if strategy == "ulysses":
        return Partition(contiguous(tokens, ranks), contiguous(kv_tokens, ranks))
    if problem.mask.hides_keys:
        query = contiguous(tokens, ranks)
        if busiest_share(problem, query) * ranks > EVEN:
            query = even_shares(problem, ranks)
        kv = query if tokens == kv_tokens else contiguous(kv_tokens, ranks)
        return Partition(query, kv)
    causal = problem.causal != "none"
    deal = zigzag if causal else contiguous
    return Partition(
        deal(tokens, ranks), (contiguous if strategy == "allgather" else deal)(kv_tokens, ranks)
    )


def busiest_share(problem: AttentionProblem, query: Sequence[Sequence[Span]]) -> float:
    """Return the share of all query–key pairs that the busiest of some ranks has."""
    seen = problem.pairs_before
    work = (sum(seen(span.stop) - seen(span.start) for span in spans) for spans in query)
    return max(work) / max(1, problem.pairs)


def even_shares(problem: AttentionProblem, ranks: int) -> tuple[tuple[Span, ...], ...]:
    """Give every rank as many tokens and, within some tokens' work, as many query–key pairs.

    Lay the sequence in a circle. Of all arcs of one rank's length, some have more than its share of
    the pairs and some have less, so one in between has just that: it is the rank's. The others do
    the same with what is left, closed to a circle again. That takes no more cuts than two a rank
    (Alon, Splitting necklaces, 1987): runs are long, and few keys are seen from two ranks.
    """
    owners: list[tuple[Span, ...]] = []
    left: tuple[Span, ...] = (Span(0, problem.q_tokens),)
    for tokens in map(len, split(problem.q_tokens, ranks)):
        circle = _Circle(problem, left)
        start = circle.fair_start(tokens)
        owners.append(circle.arc(start, tokens))
        left = circle.arc(start + tokens, token_count(left) - tokens)
    if max(map(len, owners)) > MAX_RUNS:
        return contiguous(problem.q_tokens, ranks)
    return tuple(owners)


class _Circle:
    """Some runs of the sequence, closed to a circle; places count along it."""

    def __init__(self, problem: AttentionProblem, spans: tuple[Span, ...]) -> None:
        self._seen = problem.pairs_before
        self._spans = spans
        self._places = [0, *accumulate(map(len, spans))]
        work = (self._seen(span.stop) - self._seen(span.start) for span in spans)
        self._work = [0, *accumulate(work)]
        self._tokens = self._places[-1]

    def arc(self, start: int, tokens: int) -> tuple[Span, ...]:
        """Return the runs of an arc, in the order of the sequence."""
        start %= max(1, self._tokens)
        stop = min(start + tokens, self._tokens)
        around = Span(0, start + tokens - stop)
        return tokens_of(self._spans, (around, Span(start, stop)))

    def fair_start(self, tokens: int) -> int:
        """Find where an arc begins whose pairs are its tokens' share of all."""
        share = self._work[-1] * tokens / max(1, self._tokens)

        def excess(start: int) -> float:
            return self._pairs(start, tokens) - share

        def between(low: int, high: int) -> int:
            """Halve what lies between too few pairs and too many."""
            rises = excess(low) <= 0
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if (excess(middle) <= 0) == rises else (low, middle)
            return min(low, high, key=lambda start: abs(excess(start)))

        starts = [*range(0, self._tokens, max(1, tokens)), self._tokens]
        found: dict[int, int] = {}
        for low, high in pairwise(starts):
            if excess(low) * excess(high) <= 0:
                start = between(low, high)
                runs = len(self.arc(start, tokens))
                if runs == 2:  # it crosses one seam, and leaves one: seams get no more
                    return start
                found.setdefault(runs, start)
        return found[max(found)] if found else 0

    def _pairs(self, start: int, tokens: int) -> int:
        start %= max(1, self._tokens)
        stop = start + tokens
        around = self._before(stop - self._tokens) if stop > self._tokens else 0
        return around + self._before(min(stop, self._tokens)) - self._before(start)

    def _before(self, place: int) -> int:
        """Count the pairs of all places before one."""
        index = min(bisect_right(self._places, place), len(self._spans)) - 1
        if index < 0:
            return 0
        first = self._spans[index].start
        inside = self._seen(first + place - self._places[index]) - self._seen(first)
        return self._work[index] + inside


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


def tokens_of(spans: tuple[Span, ...], rows: Sequence[Span]) -> tuple[Span, ...]:
    """Return the tokens of runs of local rows, where `spans` lie one after the other."""
    return tuple(
        both.shift(tokens.start - local.start)
        for run in rows
        for local, tokens in pieces(spans)
        if len(both := local.meet(run))
    )


@lru_cache(1 << 12)
def common(one: tuple[Span, ...], other: tuple[Span, ...]) -> tuple[tuple[Span, Span], ...]:
    """Return where each run that two shards have in common lies in either."""
    return tuple(
        (
            both.shift(local.start - tokens.start),
            both.shift(other_local.start - other_tokens.start),
        )
        for local, tokens in pieces(one)
        for other_local, other_tokens in pieces(other)
        if len(both := tokens.meet(other_tokens))
    )


@lru_cache(1 << 12)
def seen(query: tuple[Span, ...], kv: tuple[Span, ...], mask: Mask) -> tuple[Span, ...]:
    """Return the rows of `kv` that any of `query` sees, in runs that don't touch, ascending."""
    found: list[Span] = []
    runs = (
        run.shift(local.start - keys.start)
        for local, keys in pieces(kv)
        for _, rows in pieces(query)
        for run in mask.seen(rows, keys)
    )
    for run in sorted(runs):
        if found and run.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(run.stop, found[-1].stop))
        else:
            found.append(run)
    return tuple(found)


class Block(NamedTuple):
    """One rectangle of attention: rows of the rank's query against rows of a kv shard.

    ``q`` and ``kv`` count from the start of the two local arrays. Every row of a block sees a key,
    every key is seen, and the last row sees the last key; where the band has a bound, there are at
    least as many keys as rows, and no bound is negative.
    """

    q: Span
    kv: Span
    band: Band


@lru_cache(1 << 12)  # the same few again and again, in items of one shape
def blocks(query: tuple[Span, ...], kv: tuple[Span, ...], mask: Mask) -> tuple[Block, ...]:
    """Cut "these queries against these keys" into rectangles that any kernel can run.

    Kernels know bands about a diagonal that ends in the lower right corner; what a shard sees of
    another is cut so that nothing else is needed. Rectangles without a visible key are left out,
    and neighbours are joined, so that a zigzag ring runs one call where one suffices.

    Parameters
    ----------
    query, kv
        The spans of the sequence that the local arrays hold, in local order.
    mask
        `AttentionProblem.mask`.

    """
    if mask == Mask():
        q_rows, kv_rows = token_count(query), token_count(kv)
        return (Block(Span(0, q_rows), Span(0, kv_rows), FULL),) if q_rows and kv_rows else ()
    found: list[Block] = []
    for q_local, q in pieces(query):
        row: list[Block] = []
        for kv_local, keys in pieces(kv):
            shifts = q_local.start - q.start, kv_local.start - keys.start
            for block in _rectangles(q, keys, mask):
                row.append(Block(block.q.shift(shifts[0]), block.kv.shift(shifts[1]), block.band))
        found.extend(_join(row))
    return tuple(_join(found))


def _rectangles(q: Span, kv: Span, mask: Mask) -> Iterator[Block]:
    """Cut ``q × kv`` of the sequence, document by document."""
    for rows, keys in mask.parts(q, kv) if mask.documents else [(q, kv)]:
        yield from _cut(rows, keys, mask.low, mask.high)


def _cut(q: Span, kv: Span, low: int | None, high: int | None) -> Iterator[Block]:
    """Cut what is visible of ``q × kv`` under ``low <= j - i <= high``.

    First to rows that see a key and keys that are seen: the last row then sees the last key.
    Kernels want no more rows than keys where there is a bound; else there are two rectangles, one
    above the other.
    """
    q = q.meet(
        Span(q.start if high is None else kv.start - high, q.stop if low is None else kv.stop - low)
    )
    if not len(q):
        return
    kv = kv.meet(
        Span(kv.start if low is None else q.start + low, kv.stop if high is None else q.stop + high)
    )
    if low is not None and q.stop - 1 + low <= kv.start:
        low = None
    if high is not None and q.start + high >= kv.stop - 1:
        high = None
    corner = kv.stop - q.stop  # the diagonal that ends in the lower right corner
    excess = len(q) - len(kv)
    if excess <= 0 or (low is None and high is None):
        before = None if low is None else corner - low
        after = None if high is None else high - corner
        yield Block(q, kv, Band(before, after))
        return
    # Rows before `full` and one see the last key; rows up to `most` see the first.
    full = q.stop if high is None else kv.stop - high
    most = q.stop - 1 if low is None else kv.start - low
    cut = min(max(q.start + excess, full), most)
    yield from _cut(Span(q.start, cut), kv, low, high)
    yield from _cut(Span(cut, q.stop), kv, low, high)


def _join(found: Sequence[Block]) -> list[Block]:
    """Join neighbours that touch, where what they see together is one band."""
    joined: list[Block] = []
    for block in found:
        last = joined[-1] if joined else None
        both = _joined(last, block) if last else None
        if both:
            joined[-1] = both
        else:
            joined.append(block)
    return joined


def _joined(last: Block, block: Block) -> Block | None:
    """Join two blocks, if they touch and what they see together is one band."""
    (before, after), (next_before, next_after) = last.band, block.band
    if last.q == block.q and last.kv.stop == block.kv.start and after is next_before is None:
        before = None if before is None else before + len(block.kv)
        return Block(last.q, Span(last.kv.start, block.kv.stop), Band(before, next_after))
    if last.q.stop != block.q.start or last.band != block.band:
        return None
    # One above the other: of the same keys, or of keys that go on as the rows do, on one diagonal.
    whole = last.kv == block.kv and block.band == FULL
    diagonal = (
        last.kv.start == block.kv.start
        and last.kv.stop - last.q.stop == block.kv.stop - block.q.stop
        and block.band == LOWER_RIGHT
    )
    rows = Span(last.q.start, block.q.stop)
    return Block(rows, block.kv, block.band) if whole or diagonal else None


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
