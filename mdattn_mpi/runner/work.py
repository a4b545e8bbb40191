"""What the loop knows of an item: a rank's part of it, and one immutable type for each stage.

::

    Task ── read ──▶ Read ── begin ──▶ Begun ── enqueue ──▶ Enqueued ── write ──▶ Written

Each stage holds what the next one needs and nothing of the one before: host memory is free again
as soon as its last reader is done. A `Kind` of work makes tasks of items; the loop is the same for
all kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mdattn_mpi.backends import Download, HostArray
from mdattn_mpi.dataset import AnyItem, numpy_dtype
from mdattn_mpi.partition import token_count
from mdattn_mpi.problem import AnyPlan, Span, TensorSpec


@dataclass(frozen=True)
class Shard:
    """A rank's part of one tensor: the tokens of `spans`, or all of it where it has no token dim.

    ``here`` is False for an output that another rank writes: one without a token dim is the first
    rank's.
    """

    tensor: TensorSpec
    spans: tuple[Span, ...]
    here: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extent in memory."""
        return self.tensor.with_tokens(token_count(self.spans))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype in memory."""
        return numpy_dtype(self.tensor.dtype)


@dataclass(frozen=True)
class Task:
    """One item, and what this rank has to do with it.

    ``tokens`` are those that each rank of the group computes, ``reads`` and ``writes`` this rank's
    parts of the inputs and of the outputs, in the order in which the executor takes and gives them.
    """

    item: AnyItem
    plan: AnyPlan
    tokens: tuple[tuple[Span, ...], ...]
    reads: tuple[Shard, ...]
    writes: tuple[Shard, ...]


@dataclass(frozen=True)
class Read:
    """The rank's shards of the inputs are in host memory."""

    task: Task
    shards: tuple[HostArray, ...]


@dataclass(frozen=True)
class Begun:
    """They are on their way to the device."""

    task: Task
    running: Any


@dataclass(frozen=True)
class Enqueued:
    """The outputs are being computed; they come to the host by themselves."""

    task: Task
    download: Download


@dataclass(frozen=True)
class Written:
    """The rank's shards of the outputs are on the disk."""

    task: Task
    checksum: int


class Kind(Protocol):
    """A kind of work: which tensors of an item a rank reads and writes."""

    def task(self, item: AnyItem, plan: AnyPlan, rank: int) -> Task:
        """Say what the group's rank `rank` has to do with `item`."""
        ...

    def check(self, task: Task, shards: Sequence[HostArray]) -> None:
        """Look at what was read.

        Raises
        ------
        ItemError
            The item can't be computed from it; the others can.

        """
        ...

    def check_outputs(self, task: Task, arrays: Sequence[HostArray]) -> None:
        """Look at what was computed, before it is written.

        Raises
        ------
        ItemError
            It may not be written; the other items can.

        """
        ...

    def options(self) -> Mapping[str, str]:
        """What decides the bytes of the output, by name: a job is resumed with the same."""
        ...
