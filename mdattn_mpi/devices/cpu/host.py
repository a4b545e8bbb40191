"""What devices in host memory have in common: everything but the way to the other ranks."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from mdattn_mpi.devices.cpu.blocked_attention import TILE_ROWS, BlockedAttention
from mdattn_mpi.devices.cpu.exponential import Exponential, loaded_exp, prepare_exp
from mdattn_mpi.devices.cpu.partial import Partial
from mdattn_mpi.devices.cpu.tile import BLOCK_KEYS
from mdattn_mpi.devices.protocol import NO_ROWS, Rehearsed
from mdattn_mpi.mask import Span
from mdattn_mpi.partition import Block
from mdattn_mpi.problem import AttentionProblem, Plan

Array = np.ndarray[Any, np.dtype[Any]]


class HostDownload(NamedTuple):
    """Arrays that need no way back."""

    arrays: tuple[Array, ...]

    def wait(self) -> tuple[Array, ...]:
        """Return the arrays."""
        return self.arrays


class HostDevice:
    """NumPy arrays and their arithmetic; a subclass adds `exchange` and `wait`.

    Parameters
    ----------
    rank, ranks
        This rank's number in the group, and the group's size.
    threads
        Threads that compute, the caller's own among them.
    exp
        What computes exp; None means the fastest that is installed.

    Attributes
    ----------
    seconds
        Where the time went: ``compute``, ``exchange`` (time spent waiting for messages) and
        ``merge``.

    """

    def __init__(
        self, rank: int, ranks: int, threads: int = 1, exp: Exponential | None = None
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._attention = BlockedAttention(threads, self.poll, exp)
        self.seconds = {"compute": 0.0, "exchange": 0.0, "merge": 0.0}
        _BlasLimit.acquire()
        self._open = True

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self._rank

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return self._ranks

    def perform(
        self,
        attend: Callable[..., Any],
        plan: Plan,
        *inputs: Array,
        ahead: bool = False,
        **options: Any,
    ) -> Generator[None, None, tuple[Array, Array]]:
        """Do what the strategy does."""
        steps: Generator[None, None, tuple[Array, Array]] = attend(self, plan, *inputs, **options)
        return steps

    def is_ready(self, plan: Plan, **options: Any) -> bool:
        """Whether nothing is posted by `perform`: never."""
        return False

    def poll(self) -> None:
        """Keep messages going; called between blocks, by the thread that called `attend`."""

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        """An array with undefined contents, of the dtype of `like`."""
        return np.empty(shape, like.dtype)

    def copy(self, source: Array, target: Array) -> None:
        """Copy `source` into `target`; same shape, any strides."""
        np.copyto(target, source, casting="no")

    def accumulator(
        self,
        q: Array,
        v_head_dim: int,
        scale: float,
        softcap: float = 0.0,
        merged: Span = NO_ROWS,
    ) -> Partial:
        """Start with nothing seen: output 0, LSE −∞, for each row and head of `q`."""
        return Partial(q, v_head_dim, scale, softcap)

    def attend(self, accumulator: Partial, blocks: Sequence[Block], k: Array, v: Array) -> None:
        """Add the attention of rows of the query to what they see of `k` and `v`."""
        with self.timed("compute"):
            for rows, keys, band in blocks:
                self._attention.attend(accumulator, rows, k[keys.slice], v[keys.slice], band)

    def finish(self, accumulator: Partial, sinks: Array | None = None) -> tuple[Array, Array]:
        """Output ``[Sq, Nq, Hv]`` in the dtype of the query, LSE ``[Sq, Nq]`` in float32."""
        with self.timed("merge"):
            return self._attention.finish(accumulator, sinks)

    def check(self, problem: AttentionProblem) -> tuple[str, ...]:
        """Refuse what this device can't do: nothing, on the host."""
        return ()

    def prepare(self, problem: AttentionProblem, calls: Iterable[Rehearsed]) -> None:
        """Load what the largest block of scores will need."""
        rows = min(problem.q_tokens * problem.group_heads, TILE_ROWS)
        prepare_exp(rows * min(problem.kv_tokens, BLOCK_KEYS))

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array for `upload`, with undefined contents."""
        return np.empty(shape, dtype)

    def upload(self, array: Array) -> Array:
        """Take an array from the host: it is there already."""
        return array

    def download(self, *arrays: Array) -> HostDownload:
        """Bring arrays to the host: they are there already."""
        return HostDownload(arrays)

    def adopt(self, array: Array) -> Array:
        """Take an array of the caller's as it is; copied only where it isn't contiguous."""
        return np.ascontiguousarray(array)

    def export(self, array: Array) -> Array:
        """Give an array to the caller."""
        return array

    def head_start(self, problem: AttentionProblem) -> int:
        """No row: what carries messages is busy computing."""
        return 0

    def abort(self) -> None:
        """Release what can be released at once, waiting for no other rank."""

    def close(self) -> None:
        """End the threads and give BLAS back its own. Not needed at the end of a process."""
        if self._open:
            self._open = False
            self._attention.close()
            _BlasLimit.release()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to ``seconds[part]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start


@cache
def processor() -> str:
    """The name of this machine's processor."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def libraries() -> dict[str, str]:
    """What computes: NumPy, its BLAS, and whose exp, with their versions."""
    return {"numpy": np.__version__, "blas": _blas(), "exp": loaded_exp().library}


@cache
def _blas() -> str:
    """Name NumPy's BLAS, its version and the processor that it was made for."""
    for found in threadpool_info():
        if found["user_api"] == "blas":
            parts = (found.get(part) for part in ("internal_api", "version", "architecture"))
            return " ".join(filter(None, parts))
    return "unknown"


class _BlasLimit:
    """BLAS runs one thread a call while any host device is open: ours are busy already."""

    _lock = threading.Lock()
    _devices: ClassVar[int] = 0
    _limit: ClassVar[threadpool_limits | None] = None

    @classmethod
    def acquire(cls) -> None:
        with cls._lock:
            cls._devices += 1
            if cls._limit is None:
                cls._limit = threadpool_limits(1, "blas")

    @classmethod
    def release(cls) -> None:
        with cls._lock:
            cls._devices -= 1
            if cls._devices == 0 and cls._limit is not None:
                cls._limit.restore_original_limits()
                cls._limit = None
