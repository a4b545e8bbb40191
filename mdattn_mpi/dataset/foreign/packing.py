"""Query, key and value in one tensor, in the ways that programs pack them.

=======================  =====================================================
``[S, 3, N, H]``         stacked along a dim of 3, wherever it is
``[S, N, 3·H]``          one after the other in the last dim: `Packing.dim` -1
``[S, 3·N·H]``           the same without heads of its own: `Packing.heads`
``[S, (Nq + 2·Nkv)·H]``  the same with fewer kv heads
=======================  =====================================================

All of them with a batch dim too; key and value alone with 2 in place of 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mdattn_mpi.dataset.foreign.tensor import ForeignTensor
from mdattn_mpi.errors import RejectedError

Reject = Callable[[str, str], RejectedError]

LAST = -1


@dataclass(frozen=True)
class Packing:
    """What shapes don't say. `heads` of query and of key-value; `dim` that is stacked, or -1."""

    heads: tuple[int, int] | None = None
    dim: int | None = None


def unpack(parts: Sequence[ForeignTensor], how: Packing, reject: Reject) -> list[ForeignTensor]:
    """Make query, key and value, each with dims of heads and head dim, of one to three tensors.

    Raises
    ------
    RejectedError
        The shapes don't fit, or fit in more than one way.

    """
    *separate, last = parts
    count = 3 - len(separate)
    found = list(parts) if count == 1 else [*separate, *_unstack(last, count, how, reject)]
    if how.heads is None:
        return found
    return [
        _by_heads(tensor, heads, reject)
        for tensor, heads in zip(found, (how.heads[0], how.heads[1], how.heads[1]), strict=True)
    ]


def _by_heads(tensor: ForeignTensor, heads: int, reject: Reject) -> ForeignTensor:
    if len(tensor.shape) not in (2, 3) or tensor.shape[-1] % heads:
        raise reject(
            f"a tensor of shape {list(tensor.shape)} can't be cut into {heads} heads",
            "with --heads, tensors are [S, N*H] or [B, S, N*H]",
        )
    return tensor.by_heads(heads)


def _unstack(
    packed: ForeignTensor, count: int, how: Packing, reject: Reject
) -> list[ForeignTensor]:
    shape = list(packed.shape)
    choices = _choices(packed, count, how)
    dim = choices[0] if len(choices) == 1 else None
    if how.dim is not None:
        dim = how.dim
    if dim is None and choices:
        raise reject(
            f"shape {shape} can be unpacked along any of the dims {choices}",
            f"say which: {' or '.join(f'--packed-dim {dim}' for dim in choices)}",
        )
    if dim is None:
        raise reject(
            f"shape {shape} has no dim of {count} to unpack",
            f"say --heads N for [S, {count}*N*H], or --packed-dim -1 for [S, N, {count}*H]",
        )
    if dim == LAST:
        return _cut_last(packed, count, how, reject)
    if not 0 <= dim < len(shape) or shape[dim] != count:
        raise reject(
            f"dim {dim} of shape {shape} isn't {count}", "correct --packed-dim; it counts from 0"
        )
    return [packed.take(dim, position) for position in range(count)]


def _choices(packed: ForeignTensor, count: int, how: Packing) -> list[int]:
    """The dims that could be the packed one, by their extent and by the dims that would be left."""
    flat = how.heads is not None
    rank = len(packed.shape)
    dims = [dim for dim, extent in enumerate(packed.shape[:-1]) if extent == count]
    choices = dims if rank - 1 in ((2, 3) if flat else (3, 4)) else []
    if flat and rank in (2, 3) and packed.shape[-1] % sum(_shares(count, how)) == 0:
        choices.append(LAST)
    return choices


def _shares(count: int, how: Packing) -> list[int]:
    """How the last dim is divided: by heads, or evenly."""
    q_heads, kv_heads = how.heads or (1, 1)
    return [q_heads, kv_heads, kv_heads][-count:]


def _cut_last(
    packed: ForeignTensor, count: int, how: Packing, reject: Reject
) -> list[ForeignTensor]:
    shares = _shares(count, how)
    width, rest = divmod(packed.shape[-1], sum(shares))
    if rest:
        raise reject(
            f"the last dim of shape {list(packed.shape)} doesn't divide by {sum(shares)}",
            "correct --heads: N, or NQ/NKV",
        )
    stops = [width * sum(shares[: n + 1]) for n in range(count)]
    return [
        packed.columns(stop - width * share, stop)
        for stop, share in zip(stops, shares, strict=True)
    ]
