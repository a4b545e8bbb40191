"""Which calls of the kernel a strategy will make: it is run on arrays that have only a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mdattn_mpi.devices.protocol import NO_ROWS, Message, Rehearsed
from mdattn_mpi.mask import Span
from mdattn_mpi.partition import Block, partition_of, token_count
from mdattn_mpi.problem import Plan

Dims = tuple[int, ...]


class Shape:
    """An array that has only a shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __getitem__(self, index: Any) -> Shape:
        slices = index if isinstance(index, tuple) else (index,)
        cut = (len(range(*part.indices(n))) for part, n in zip(slices, self.shape, strict=False))
        return Shape(*cut, *self.shape[len(slices) :])


class Rehearsal:
    """A device that only notes the calls of `attend`; see `protocol.Device`."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.calls: list[Rehearsed] = []

    def empty(self, shape: Dims, like: Shape) -> Shape:
        """Make an array."""
        return Shape(*shape)

    def copy(self, source: Shape, target: Shape) -> None:
        """Do nothing."""

    def exchange(self, send: Sequence[Message[Any]], receive: Sequence[Message[Any]]) -> None:
        """Do nothing."""

    def wait(self, transfer: None) -> None:
        """Do nothing."""

    def accumulator(
        self,
        q: Shape,
        v_head_dim: int,
        scale: float,
        softcap: float = 0.0,
        merged: Span = NO_ROWS,
    ) -> tuple[Shape, Shape, Span]:
        """Start with nothing."""
        return q, Shape(*q.shape[:2], v_head_dim), merged

    def attend(
        self, accumulator: tuple[Shape, Shape, Span], blocks: Sequence[Block], k: Shape, v: Shape
    ) -> None:
        """Note the call."""
        q, _, merged = accumulator
        if blocks and q.shape[1]:
            shared = merged.start <= blocks[0].q.start < merged.stop
            self.calls.append(Rehearsed(tuple(blocks), q.shape[1], k.shape[1], shared))

    def finish(
        self, accumulator: tuple[Shape, Shape, Span], sinks: Shape | None = None
    ) -> tuple[Shape, Shape]:
        """Return output and LSE."""
        _, output, _ = accumulator
        return output, Shape(*output.shape[:2])


def rehearse(attend: Callable[..., Any], plan: Plan, rank: int) -> list[Rehearsed]:
    """Return the calls that `attend`, a strategy, makes on a rank."""
    problem, owners = plan.problem, partition_of(plan)
    device = Rehearsal(rank, plan.ranks)
    q = Shape(token_count(owners.query[rank]), problem.q_heads, problem.head_dim)
    kv = token_count(owners.kv[rank]), problem.kv_heads
    steps = attend(device, plan, q, Shape(*kv, problem.head_dim), Shape(*kv, problem.v_head_dim))
    for _ in steps:
        pass
    return device.calls
