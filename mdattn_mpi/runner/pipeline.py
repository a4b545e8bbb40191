"""Reading ahead and writing behind: one thread each, so that files never wait for the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, Generic, TypeVar

T = TypeVar("T")
W = TypeVar("W")
R = TypeVar("R")


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
    """Run `write` on finished work, at most `lag` pieces behind the caller.

    What it returns comes back from `oldest`, in the order of `put`, beside the task that it was put
    for; nothing keeps the work itself once it is written.
    """

    def __init__(self, write: Callable[[W], R], lag: int = 2) -> None:
        super().__init__("mdattn-write")
        self._write = write
        self._lag = lag
        self._pending: deque[tuple[T, Future[R]]] = deque()
        self._others: deque[Future[None]] = deque()

    @property
    def under_way(self) -> int:
        """How many pieces have been put and not been taken."""
        return len(self._pending)

    def put(self, task: T, work: W) -> None:
        """Start writing `work` after all that was put before."""
        self._pending.append((task, self.submit(self._write, work)))

    def oldest(self, *, drain: bool = False) -> tuple[T, Future[R]] | None:
        """Take the oldest piece, once more than `lag` are under way (or any, to drain)."""
        if not self._pending or (len(self._pending) <= self._lag and not drain):
            return None
        return self._pending.popleft()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` in the writing thread too; what it raises comes from `check`."""
        self._others.append(self.submit(function, *arguments))

    def check(self, *, drain: bool = False) -> None:
        """Raise what a call of `run` has raised; wait for all of them to drain."""
        while self._others and (drain or self._others[0].done()):
            self._others.popleft().result()
