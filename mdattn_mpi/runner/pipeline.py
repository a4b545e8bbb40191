"""Reading ahead and writing behind: one thread each, so that files never wait for the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic, perf_counter
from typing import Any, Generic, TypeVar

T = TypeVar("T")
W = TypeVar("W")
R = TypeVar("R")

MOST_UNSYNCED = 0.05  # seconds; pieces that are written in less share a sync


class Background:
    """A thread that makes one call after the other; ``seconds`` is how long they took."""

    def __init__(self, name: str) -> None:
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Call `function` after all that was submitted before."""
        return self._thread.submit(self._timed, function, *arguments)

    def _timed(self, function: Callable[..., R], *arguments: Any) -> R:
        start = perf_counter()
        try:
            return function(*arguments)
        finally:
            self.seconds += perf_counter() - start

    def close(self, *, wait: bool = False) -> None:
        """End the thread; without `wait`, what hasn't started is dropped."""
        self._thread.shutdown(wait=wait, cancel_futures=not wait)


class ReadAhead(Background, Generic[T, R]):
    """Run `read` on the next of `tasks` while the caller works on the one before.

    Iterating gives ``(task, future)``; the future holds or raises what `read` did. `room` is called
    in the caller's thread and gives what `read` is to fill; nobody else keeps it.
    """

    def __init__(
        self, tasks: Iterable[T], room: Callable[[T], Any], read: Callable[[T, Any], R]
    ) -> None:
        super().__init__("mdattn-read")
        self._futures = ((task, self.submit(read, task, room(task))) for task in tasks)
        self._next = next(self._futures, None)

    def __iter__(self) -> Iterator[tuple[T, Future[R]]]:
        return self

    def __next__(self) -> tuple[T, Future[R]]:
        if self._next is None:
            raise StopIteration
        ready, self._next = self._next, next(self._futures, None)
        return ready


class WriteBehind(Background, Generic[T, W, R]):
    """Run `write` on finished work, behind the caller.

    What it returns comes back from `oldest`, in the order of `put`, beside the task that it was put
    for; nothing keeps the work itself once it is written.

    `sync` makes what was written last. It follows a piece after which none waits to be written, or
    comes `MOST_UNSYNCED` seconds after the one before: pieces that come faster than a disk syncs
    share one. With ``every`` it comes just every so many seconds, and where there are none left.

    Attributes
    ----------
    taken
        Pieces that `oldest` has given.
    synced
        Pieces, the first so many, that are on the disk: all that can be written of them.

    """

    def __init__(
        self,
        write: Callable[[W], R],
        sync: Callable[[], None] = lambda: None,
        *,
        lag: Callable[[T], int] = lambda _: 2,
        every: float = 0.0,
    ) -> None:
        super().__init__("mdattn-write")
        self._write = write
        self._sync = sync
        self._lag = lag
        self._every = every
        self._pending: deque[tuple[T, Future[R]]] = deque()
        self._others: deque[Future[None]] = deque()
        self._put = self._written = self.taken = self.synced = 0
        self._last_sync = monotonic()
        self._lost: Exception | None = None

    @property
    def under_way(self) -> int:
        """How many pieces have been put and not been taken."""
        return len(self._pending)

    def put(self, task: T, work: W) -> None:
        """Start writing `work` after all that was put before."""
        self._put += 1
        self._pending.append((task, self.submit(self._write_one, work)))

    def _write_one(self, work: W) -> R:
        try:
            result = self._write(work)
        finally:
            self._written += 1
        waited = monotonic() - self._last_sync
        nothing_waits = self._written == self._put and not self._every
        if nothing_waits or waited >= (self._every or MOST_UNSYNCED):
            self._sync_all()
        return result

    def _sync_all(self) -> None:
        """Sync, or raise what an earlier sync did: the kernel tells of a lost page only once."""
        if self._lost is not None:
            raise self._lost
        written = self._written
        try:
            self._sync()
        except Exception as error:
            self._lost = error
            raise
        self.synced, self._last_sync = written, monotonic()

    def oldest(self, *, synced: int = 0, drain: bool = False) -> tuple[T, Future[R]] | None:
        """Take the oldest piece, if it is among the first `synced`, or one too many is under way.

        To drain, take any.
        """
        if not self._pending:
            return None
        too_many = len(self._pending) > self._lag(self._pending[0][0])
        if not (drain or too_many or self.taken < synced):
            return None
        self.taken += 1
        return self._pending.popleft()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` in the writing thread too; what it raises comes from `check`."""
        self._others.append(self.submit(function, *arguments))

    def sync(self) -> None:
        """Wait until all that was put is on the disk."""
        self.submit(self._sync_all).result()

    def check(self, *, drain: bool = False) -> None:
        """Raise what a call of `run` has raised; wait for all of them to drain."""
        while self._others and (drain or self._others[0].done()):
            self._others.popleft().result()
