"""The verbs that a strategy is written in.

A device is where arrays live and travel. Strategies know these verbs and nothing else, so that one
readable loop runs on NumPy + MPI, on CUDA, and on threads in a test.

Everything a device does is in order: an array handed to a verb has been written by all verbs before
it. `exchange` is the one exception: it returns at once, and what it receives may be read only after
`wait`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from mdattn_mpi.problem import Span


class Array(Protocol):
    """An array on a device: token-major ``[tokens, heads, dim]``, sliced without a copy."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of every dim."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """A view; basic slices only."""
        ...


A = TypeVar("A", bound=Array)
NO_ROWS = Span(0, 0)


class Message(NamedTuple):
    """An array on its way to `peer`, or expected from it."""

    array: Any
    peer: int


class Transfer(Protocol):
    """Messages under way; keeps the arrays alive until it is waited for."""


class Rehearsed(NamedTuple):
    """A call of `Device.attend` that is going to come; `merged` as its accumulator was told."""

    rows: int
    keys: int
    q_heads: int
    kv_heads: int
    causal: bool
    merged: bool


class Accumulator(Protocol):
    """The partial results of one query shard; see `Device.attend`."""


class Device(Protocol[A]):
    """One rank's place in a group, and the arithmetic of its arrays."""

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        ...

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        ...

    def empty(self, shape: tuple[int, ...], like: A) -> A:
        """An array with undefined contents, of the dtype of `like`. No dim need be above 0."""
        ...

    def copy(self, source: A, target: A) -> None:
        """Copy `source` into `target`; same shape, any strides; nothing to do for empty ones."""
        ...

    def exchange(self, send: Sequence[Message], receive: Sequence[Message]) -> Transfer:
        """Collective. Start sending and receiving; return at once.

        Messages between the same two ranks arrive in the order in which they were given. Arrays
        are contiguous; an empty one is skipped on both sides. A message to the rank itself is
        allowed. What is sent may not be written, and what is received not be touched, before
        `wait`.
        """
        ...

    def wait(self, transfer: Transfer) -> None:
        """Let everything that follows see what `transfer` received."""
        ...

    def accumulator(
        self, q: A, v_head_dim: int, scale: float, merged: Span = NO_ROWS
    ) -> Accumulator:
        """Start with nothing seen: output 0, LSE −∞, for each row and head of `q`, if any.

        Rows that more than one `attend` will add to had better be in `merged`: their results are
        kept as exactly as the device can until they are merged. A call has rows in it or outside.
        """
        ...

    def attend(self, accumulator: Accumulator, rows: Span, k: A, v: A, causal: bool) -> None:
        """Add the attention of the query's `rows` to all of `k` and `v`.

        `causal` means ``lower_right``, with at least as many keys as rows. Query head ``n`` reads
        kv head ``n // (Nq / Nkv)``.
        """
        ...

    def finish(self, accumulator: Accumulator) -> tuple[A, A]:
        """Merge what `attend` added, in float32, rounded once.

        Returns the output ``[Sq, Nq, Hv]`` in the dtype of the query and the natural-log LSE
        ``[Sq, Nq]`` in float32. Rows that saw no key give 0 and −∞.
        """
        ...
