"""Which tokens of a sequence each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, get_args

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.partition import contiguous, token_count, zigzag
from mdattn_mpi.problem import Span

Order = Literal["contiguous", "zigzag"]


def shard_spans(
    tokens: int, rank: int, ranks: int, order: Order = "contiguous"
) -> tuple[Span, ...]:
    """Tell which tokens of a sequence a rank holds, one span after the other in one array.

    Parameters
    ----------
    tokens
        The length of the whole sequence.
    rank, ranks
        Which of how many ranks.
    order
        ``contiguous``: one run a rank, in rank order. ``zigzag``: chunks ``r`` and ``2P-1-r`` of
        ``2P``, so that under a causal mask all ranks have the same work.

    Raises
    ------
    RejectedError
        There is no such rank, length or order.

    """
    check_order(order)
    if not 0 <= rank < ranks or tokens < 0:
        raise RejectedError(
            f"rank {rank} of {ranks}, {tokens} tokens", fix="use 0 <= rank < ranks and tokens >= 0"
        )
    owners = zigzag if order == "zigzag" else contiguous
    return owners(tokens, ranks)[rank]


def check_order(order: str) -> None:
    """Refuse what isn't an `Order`."""
    if order not in get_args(Order):
        raise RejectedError(f"order is {order!r}", fix="use contiguous or zigzag")


def owners_of(side: str, sizes: Sequence[int], order: Order) -> tuple[tuple[Span, ...], ...]:
    """Tell the tokens of every rank from how many each holds.

    Raises
    ------
    RejectedError
        A rank doesn't hold its zigzag share.

    """
    if order == "contiguous":
        return tuple((Span(*ends),) for ends in pairwise(accumulate(sizes, initial=0)))
    owners = zigzag(sum(sizes), len(sizes))
    for rank, (size, spans) in enumerate(zip(sizes, owners, strict=True)):
        if size != token_count(spans):
            raise RejectedError(
                f"holds {size} {side} tokens; its zigzag share of {sum(sizes)} over {len(sizes)} "
                f"ranks is {token_count(spans)}",
                fix="hold the tokens that mdattn_mpi.shard_spans gives, or say order='contiguous'",
                rank=rank,
            )
    return owners
