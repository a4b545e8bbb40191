"""Reading ahead and writing behind: one thread each, so that files never wait for the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Generic, TypeVar

T = TypeVar("T")
W = TypeVar("W")
R = TypeVar("R")


class ReadAhead(Generic[T, R]):
    """Run `read` on the next of `tasks` while the caller works on the one before.

    Iterating gives ``(task, future)``; the future holds or raises what `read` did. `room` is called
    in the caller's thread and gives what `read` is to fill; nobody else keeps it.
    """

    def __init__(
        self, tasks: Iterable[T], room: Callable[[T], Any], read: Callable[[T, Any], R]
    ) -> None:
        self._tasks = iter(tasks)
        self._room = room
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mdattn-read")
        self.seconds = 0.0
        self._next = self._start()

    def __iter__(self) -> Iterator[tuple[T, Future[R]]]:
        return self

    def __next__(self) -> tuple[T, Future[R]]:
        if self._next is None:
            raise StopIteration
        ready, self._next = self._next, self._start()
        return ready

    def _start(self) -> tuple[T, Future[R]] | None:
        for task in self._tasks:
            return task, self._thread.submit(self._timed, task, self._room(task))
        return None

    def _timed(self, task: T, room: Any) -> R:
        start = perf_counter()
        try:
            return self._read(task, room)
        finally:
            self.seconds += perf_counter() - start

    def close(self) -> None:
        """Drop what was read ahead."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass
class WriteBehind(Generic[T, W, R]):
    """Run `write` on finished work, at most `lag` pieces behind the caller.

    What it returns comes back from `oldest`, in the order of `put`, beside the task that it was put
    for; nothing keeps the work itself once it is written.
    """

    write: Callable[[W], R]
    lag: int = 2
    seconds: float = 0.0
    _pending: deque[tuple[T, Future[R]]] = field(default_factory=deque)
    _others: deque[Future[Any]] = field(default_factory=deque)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="mdattn-write")
    )

    @property
    def under_way(self) -> int:
        """How many pieces have been put and not been taken."""
        return len(self._pending)

    def put(self, task: T, work: W) -> None:
        """Start writing `work` after all that was put before."""
        self._pending.append((task, self._thread.submit(self._timed, self.write, work)))

    def oldest(self, *, drain: bool = False) -> tuple[T, Future[R]] | None:
        """Take the oldest piece, once more than `lag` are under way (or any, to drain)."""
        if not self._pending or (len(self._pending) <= self.lag and not drain):
            return None
        return self._pending.popleft()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` in the writing thread too; what it raises comes from `check`."""
        self._others.append(self._thread.submit(self._timed, function, *arguments))

    def check(self, *, drain: bool = False) -> None:
        """Raise what a call of `run` has raised; wait for all of them to drain."""
        while self._others and (drain or self._others[0].done()):
            self._others.popleft().result()

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        start = perf_counter()
        try:
            return function(*arguments)
        finally:
            self.seconds += perf_counter() - start

    def close(self, *, wait: bool) -> None:
        """End the thread; without `wait`, what hasn't started is dropped."""
        self._thread.shutdown(wait=wait, cancel_futures=not wait)
