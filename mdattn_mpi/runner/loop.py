"""The batch loop: read → agree → enqueue → agree → write → commit.

Everything on this page happens on all ranks of a group in the same order. Item i+1 is begun while
item i computes, read while item i is begun, and item i-1 is written meanwhile; an agreement, which
is also the barrier, stands before and after every enqueue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from mdattn_mpi.backends import Backend, Download, HostArray
from mdattn_mpi.dataset import Item
from mdattn_mpi.errors import ItemError, MdattnError
from mdattn_mpi.lockstep import Board, Deadlines, Group, Step
from mdattn_mpi.problem import Plan, Span
from mdattn_mpi.runner.clock import PhaseClock
from mdattn_mpi.runner.pipeline import ReadAhead, WriteBehind

Shards = tuple[HostArray, HostArray, HostArray]

MEANWHILE = ("agree", "read", "begin", "enqueue", "write")  # what others may do while one agrees


@dataclass
class Work:
    """One item on its way through a rank."""

    item: Item
    plan: Plan
    query: tuple[Span, ...]  # the tokens whose output this rank computes
    kv: tuple[Span, ...]
    shards: Shards | None  # room for what is read
    running: Any = None
    download: Download | None = None


@dataclass(frozen=True)
class Files:
    """What the loop needs from the files; every callable raises an `MdattnError`.

    ``read`` and ``write`` run in threads of their own. ``commit`` and ``fail`` are called on the
    group's first rank only.
    """

    read: Callable[[Work], Shards]
    write: Callable[[Work], int]
    commit: Callable[[Work, list[int]], None]
    fail: Callable[[Item, str], None]


class Loop:
    """One group's way through its items."""

    def __init__(
        self,
        group: Group,
        backend: Backend,
        files: Files,
        *,
        board: Board,
        deadlines: Deadlines,
        wants_to_stop: Callable[[], bool],
        finished: Callable[[Work], None],
        failed: Callable[[Item, ItemError], None],
    ) -> None:
        self.group = group
        self.backend = backend
        self.files = files
        self.clock = PhaseClock(board, deadlines)
        self.wants_to_stop = wants_to_stop
        self.finished = finished
        self.failed = failed
        self.stopped = False
        self.work = 0  # operations of the item in hand

    def run(self, tasks: Iterable[Work]) -> None:
        """Collective. Compute and commit all `tasks`, or those before a stop was agreed on.

        Raises
        ------
        MdattnError
            The same on all ranks. Items that were committed before stay so.

        """
        self.reads = ReadAhead(tasks, self.files.read)
        self.writes = WriteBehind(self.files.write)
        try:
            current = self._begin_next()
            while current is not None:
                following = self._begin_next()  # its agreement is the barrier before this enqueue
                self._enqueue(current)
                self._commit_oldest("enqueued")
                current = following
            while self._commit_oldest("drain", drain=True):
                pass
            self.writes.close(wait=True)
        except BaseException:
            self.writes.close(wait=False)
            raise
        finally:
            self.clock.stop()
            self.reads.close()

    def _begin_next(self) -> Work | None:
        """Agree on the next item of which every rank has its shards, and begin it."""
        while True:
            work, shards, error = self._take()
            try:
                stop = self._agree("begin", work, error=error)
            except ItemError as failure:
                assert work is not None
                self._fail(work, failure)
                continue
            if work is None:
                return None  # a wish to stop that comes now finds nothing to stop
            if stop:
                self.stopped = True
                return None
            assert shards is not None
            self.clock.enter("begin", work.item.name, work.item.problem.flops)
            work.running = self.backend.begin(work.plan, *shards)
            return work

    def _take(self) -> tuple[Work | None, Shards | None, MdattnError | None]:
        """Wait for the reader. What went wrong on this rank goes into the next agreement."""
        ready = None if self.stopped else next(self.reads, None)
        if ready is None:
            return None, None, None
        work, future = ready
        self.clock.enter("read", work.item.name, work.item.problem.flops)
        shards, error = _outcome(future, work, self.group.rank)
        return work, shards, error

    def _enqueue(self, work: Work) -> None:
        self.work = work.item.problem.flops
        self.clock.enter("enqueue", work.item.name, self.work)
        self.backend.enqueue(work.running)
        work.download = self.backend.collect(work.running)
        work.running = None
        self.writes.put(work)

    def _commit_oldest(self, phase: str, *, drain: bool = False) -> bool:
        """Agree; the agreement carries the checksums of the oldest item that was written."""
        oldest = self.writes.oldest(drain=drain)
        work, checksum, error = None, None, None
        if oldest is not None:
            work, future = oldest
            self.clock.enter("write", work.item.name, work.item.problem.flops)
            checksum, error = _outcome(future, work, self.group.rank)
        try:
            self.writes.check(drain=work is None and drain)
        except MdattnError as failure:
            error = error or failure
        self._agree(phase, work, error=error, checksum=checksum)
        if work is not None:
            if self.group.rank == 0:
                self.writes.errand(self.files.commit, work, self.checksums)
            self.finished(work)
        return work is not None

    def _fail(self, work: Work, failure: ItemError) -> None:
        if self.group.rank == 0:
            self.writes.errand(self.files.fail, work.item, str(failure))
        self.failed(work.item, failure)

    def _agree(
        self,
        phase: str,
        work: Work | None,
        *,
        error: MdattnError | None,
        checksum: int | None = None,
    ) -> bool:
        """Agree on what comes next; True when any rank wants to stop."""
        step = Step(
            work.item.index if work else -1,
            phase,
            work.plan.digest if work else 0,
            (lambda: {"item": work.item.name, **work.plan.facts()}) if work else dict,
        )
        name, flops = (work.item.name, work.item.problem.flops) if work else ("", 0)
        self.clock.enter("agree", name, max(self.work, flops), MEANWHILE)
        agreement = self.group.agree(
            step, error=error, checksum=checksum, stop=self.wants_to_stop()
        )
        self.checksums = list(agreement.checksums)
        return bool(agreement.stop)


def _outcome(
    future: Future[Any], work: Work, rank: int
) -> tuple[Any, None] | tuple[None, MdattnError]:
    """Wait for a thread; its value, or its error with its place filled in."""
    try:
        return future.result(), None
    except Exception as error:
        return None, MdattnError.wrap(error, item=work.item.name, rank=rank)
