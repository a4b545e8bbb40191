"""The verbs that a strategy is written in.

A device is where arrays live and travel. Strategies know these verbs and nothing else, so that one
readable loop runs on NumPy + MPI, on CUDA, and on threads in a test.

Everything a device does is in order: an array handed to a verb has been written by all verbs before
it. `exchange` is the one exception: it returns at once, and what it receives may be read only after
`wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from mdattn_mpi.mask import Span
from mdattn_mpi.partition import Block
from mdattn_mpi.problem import AttentionProblem, Plan

if TYPE_CHECKING:
    import numpy as np

    from mdattn_mpi.estimate import Costs

R = TypeVar("R")
HostArray: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def run_to_end(steps: Generator[None, None, R]) -> R:
    """Run a strategy on from its ``yield``; return what it returns."""
    try:
        next(steps)
    except StopIteration as end:
        result: R = end.value
        return result
    raise AssertionError("a strategy yields once")


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
T = TypeVar("T")  # messages under way, whose arrays it keeps alive until it is waited for
P = TypeVar("P")  # the partial results of one query shard
Message = tuple[A, int]  # an array on its way to a rank, or expected from it
NO_ROWS = Span(0, 0)


class Rehearsed(NamedTuple):
    """A call of `Device.attend` that is going to come; `merged` as its accumulator was told."""

    blocks: tuple[Block, ...]
    q_heads: int
    kv_heads: int
    merged: bool


class Device(Protocol[A, T, P]):
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

    def exchange(self, send: Sequence[Message[A]], receive: Sequence[Message[A]]) -> T:
        """Collective. Start sending and receiving; return at once.

        Messages between the same two ranks arrive in the order in which they were given. Arrays
        are contiguous, but for those of messages to the rank itself, which are allowed; an empty
        one is skipped on both sides. What is sent may not be written, and what is received not be
        touched, before `wait`.
        """
        ...

    def wait(self, transfer: T) -> None:
        """Let everything that follows see what `transfer` received."""
        ...

    def accumulator(
        self, q: A, v_head_dim: int, scale: float, softcap: float = 0.0, merged: Span = NO_ROWS
    ) -> P:
        """Start with nothing seen: output 0, LSE −∞, for each row and head of `q`, if any.

        Scores are multiplied by `scale`; then ``softcap · tanh(score / softcap)``, unless it is 0.
        Rows that more than one `attend` will add to had better be in `merged`: their results are
        kept as exactly as the device can until they are merged. A block has rows in it or outside.
        """
        ...

    def attend(self, accumulator: P, blocks: Sequence[Block], k: A, v: A) -> None:
        """Add the attention of rows of the query to what they see of `k` and `v`, block by block.

        Blocks are those of `partition.blocks`, for the query and these keys. Query head ``n`` reads
        kv head ``n // (Nq / Nkv)``.
        """
        ...

    def finish(self, accumulator: P, sinks: A | None = None) -> tuple[A, A]:
        """Merge what `attend` added, in float32, rounded once.

        `sinks` ``[Nq]``, float32, are one more score a head, which takes weight and has no value.

        Returns the output ``[Sq, Nq, Hv]`` in the dtype of the query and the natural-log LSE
        ``[Sq, Nq]`` in float32, sinks included. Rows that saw no key give 0, and −∞ or the sink.
        """
        ...


class Download(Protocol):
    """Arrays on their way to the host."""

    def wait(self) -> Sequence[HostArray]:
        """Return the arrays, in the order in which they were asked for; any thread may call."""
        ...


class HostedDevice(Device[A, T, P], Protocol[A, T, P]):
    """A device with a way from and to its host: what a backend and the library call need."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far in ``compute``, ``exchange`` and ``merge``."""
        ...

    def perform(
        self,
        attend: Callable[..., Any],
        plan: Plan,
        *inputs: A,
        ahead: bool = False,
        **options: Any,
    ) -> Generator[None, None, tuple[A, A]]:
        """Collective. ``attend(device, plan, *inputs, **options)``, a strategy; or its replay.

        A device may note what a strategy asks it for, and do just that for later calls of one plan
        and the same options. `ahead` says that what stands before the ``yield`` is to go on while
        the call before computes.
        """
        ...

    def is_ready(self, plan: Plan, **options: Any) -> bool:
        """Whether `perform` will need no other rank before its ``yield``; alike on all ranks.

        Then its generator may be closed there, as if it had not been called.
        """
        ...

    def check(self, problem: AttentionProblem) -> tuple[str, ...]:
        """Refuse what the device can't do, as a RejectedError; say what does it, and why."""
        ...

    def prepare(self, problem: AttentionProblem, calls: Iterable[Rehearsed]) -> None:
        """Make ready for calls that are going to come."""
        ...

    def costs(self, problem: AttentionProblem) -> Costs:
        """Rough figures of the device and what attends to `problem`, alike on all ranks."""
        ...

    def head_start(self, problem: AttentionProblem) -> int:
        """Query rows for which `strategies.allgather` needn't wait."""
        ...

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """An array with undefined contents that `upload` takes without waiting for it."""
        ...

    def upload(self, array: HostArray) -> A:
        """Take an array from the host."""
        ...

    def download(self, *arrays: A) -> Download:
        """Start bringing arrays to the host."""
        ...

    def adopt(self, array: Any) -> A:
        """Take an array of the caller's; copied only if it isn't contiguous."""
        ...

    def export(self, array: A) -> Any:
        """Give an array to the caller; nothing is copied."""
        ...

    def describe(self) -> Mapping[str, str]:
        """The device and the libraries, with versions."""
        ...

    def close(self) -> None:
        """Release everything, in order."""
        ...

    def abort(self) -> None:
        """Release what would keep other ranks waiting; wait for none of them."""
        ...


AnyDevice = HostedDevice[Any, Any, Any]  # for those who don't ask whose arrays they pass on
