"""Which stream waits for what on a GPU: the one place where events are made and waited for.

Every stream is in a `Queue`, and nothing gets into it but through there. A queue counts what it was
given. A fence names counts ("the first 17 of this queue, the first 4 of that one") and never an
event, so it can't be stale: the event that stands for a count is looked for, or made, when somebody
has to wait, and one that was made earlier doesn't stand for anything that came later.

A queue also knows how far it has waited for the others, and for what they had waited themselves
(vector clocks): nothing is waited for twice. To say that something has been used takes no call to
the driver, so that a destructor may.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from mdattn_mpi.devices.cuda.gpu import Event, Gpu, Stream

KEPT = 16  # marks a queue remembers, and streams it remembers to have waited for
T = TypeVar("T")


class _Mark(NamedTuple):
    """An event, the count that it stands for, and what its queue had waited for by then."""

    position: int
    event: Event
    after: dict[Queue, int]


class Queue:
    """A stream of the GPU.

    Parameters
    ----------
    gpu
        See `gpu.Gpu`.
    stream
        What `gpu` takes for a stream; from here on only the queue's own.
    owner
        Kept as long as anything may have to wait for the stream.
    leaves
        Whether it copies to the host.

    Attributes
    ----------
    count
        How many things the stream was given, waits included.
    captured
        Whether what it is given is noted, not done: then nothing becomes past.

    """

    def __init__(
        self, gpu: Gpu, stream: Stream, owner: Any = None, *, leaves: bool = False
    ) -> None:
        self._gpu, self._stream, self._owner = gpu, stream, owner
        self.leaves = leaves
        self.count = 0
        self.captured = False
        self._marks: deque[_Mark] = deque(maxlen=KEPT)  # in order
        self._after: dict[Queue, int] = {}
        self._done = 0

    @property
    def now(self) -> Fence:
        """The fence of everything so far."""
        return {self: self.count}

    def enqueue(self, act: Callable[..., T], *args: Any) -> T:
        """Call ``act(*args, stream)``, which gives the stream something to do."""
        self.count += 1
        return act(*args, self._stream)

    def advance(self) -> Fence:
        """Say that others may have given the stream something; return the fence of that."""
        self.count += 1
        return self.now

    def wait(self, *fences: Fence) -> None:
        """Let what is enqueued from now on come after `fences`; the host goes on.

        Give first what comes after most: it may make the rest needless.
        """
        for fence in fences:
            for queue, count in fence.items():
                if queue is self or self._after.get(queue, 0) >= count or queue.is_past(count):
                    continue
                self._wait_for(queue, queue._mark_of(count))

    def follows(self, queue: Queue, count: int) -> bool:
        """Whether the stream comes after the first `count` of `queue` already."""
        return self._after.get(queue, 0) >= count

    def is_past(self, count: int) -> bool:
        """Whether the GPU is known to have done the first `count`."""
        if count > self._done and not self.captured:
            mark = next((mark for mark in self._marks if mark.position >= count), None)
            if mark and mark.event.is_done:
                self._done = mark.position
        return count <= self._done

    def forget(self) -> None:
        """Take everything so far for past."""
        self._done = self.count

    def mark(self, *, timed: bool = False) -> Event:
        """Record an event of everything so far; marks that are `timed` give milliseconds by -."""
        count = self.count  # before it is recorded: another thread may `advance` meanwhile
        event = self._gpu.record(self._stream, timed=timed)
        self._marks.append(_Mark(count, event, dict(self._after)))
        return event

    def event(self, count: int) -> Event:
        """Return an event that comes no sooner than the first `count`."""
        return self._mark_of(count).event

    def _mark_of(self, count: int) -> _Mark:
        """Find the first event that stands for `count`, or make one."""
        if not self._marks or self._marks[-1].position < count:
            self.mark()
        return next(mark for mark in self._marks if mark.position >= count)

    def _wait_for(self, queue: Queue, mark: _Mark) -> None:
        self.enqueue(lambda stream: self._gpu.wait(stream, mark.event))
        if len(self._after) > KEPT:  # callers come and go; what is forgotten is waited for again
            self._after.clear()
        extend(self._after, mark.after)
        extend(self._after, {queue: mark.position})


Fence = dict[Queue, int]


def extend(fence: Fence, more: Mapping[Queue, int]) -> None:
    """Let `fence` come after `more` too."""
    for queue, count in more.items():
        if fence.get(queue, 0) < count:
            fence[queue] = count


def latest(*fences: Fence) -> Fence:
    """Return the fence that comes after all of `fences`."""
    found: Fence = {}
    for fence in fences:
        extend(found, fence)
    return found


def is_past(fence: Fence) -> bool:
    """Whether the GPU is known to be past `fence`."""
    return all(queue.is_past(count) for queue, count in fence.items())


def events(fence: Fence) -> list[Event]:
    """Return events that come no sooner than `fence`; any thread may ``sync`` them."""
    return [queue.event(count) for queue, count in fence.items()]


class Held:
    """Things that the GPU still uses, although nobody else may."""

    def __init__(self) -> None:
        self._held: deque[tuple[list[Event], Any]] = deque()

    def hold(self, thing: Any, fence: Fence) -> None:
        """Keep `thing` until `fence` is past; let go of what was kept long enough."""
        self.let_go()
        self._held.append((events(fence), thing))

    def let_go(self) -> None:
        """Let go of what was kept long enough."""
        while self._held and all(event.is_done for event in self._held[0][0]):
            self._held.popleft()

    def clear(self) -> None:
        """Let go of everything: the GPU has come to rest."""
        self._held.clear()
