"""The batch loop: read → agree → enqueue → agree → write → commit.

Everything on this page happens on all ranks of a group in the same order. Item i+1 is begun while
item i computes, read while item i is begun, and item i-1 is written meanwhile. An agreement, which
is also the barrier, stands before and after every enqueue: one between two enqueues is both, and is
about the item that was written as well as about the one that begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, TypeVar

from mdattn_mpi.backends import Executor, HostArray
from mdattn_mpi.dataset import AnyItem
from mdattn_mpi.errors import ItemError, MdattnError
from mdattn_mpi.lockstep import Agreement, Board, Deadlines, Group, Step
from mdattn_mpi.runner.clock import PhaseClock
from mdattn_mpi.runner.events import Note
from mdattn_mpi.runner.pipeline import ReadAhead, WriteBehind
from mdattn_mpi.runner.work import Begun, Enqueued, Read, Task, Written

S = TypeVar("S", Read, Written)

MEANWHILE = ("agree", "read", "begin", "enqueue", "write")  # what others may do while one agrees

# Items whose outputs are so small together may be under way to the disk, but at most so many.
SMALL_BYTES = 1 << 20
MOST_BEHIND, LEAST_BEHIND = 16, 2


@dataclass(frozen=True)
class Outcome(Generic[S]):
    """What a thread made of an item: the stage that it reached, or what went wrong."""

    task: Task
    stage: S | None = None
    error: MdattnError | None = None

    @property
    def refused(self) -> ItemError | None:
        """What is wrong with this item and with nothing else; any other error ends the job."""
        return self.error if isinstance(self.error, ItemError) else None


@dataclass(frozen=True)
class Files:
    """What the loop needs from the files; every callable raises an `MdattnError`.

    ``read`` and ``write`` run in threads of their own; an `ItemError` of theirs lets the other
    items go on. ``sync`` makes what was written last. ``commit`` takes items that are on all ranks'
    disks, each with the checksums of all ranks; it and ``fail`` are called on the group's first
    rank only.
    """

    read: Callable[[Task, Sequence[HostArray]], Read]
    write: Callable[[Enqueued], Written]
    sync: Callable[[], None]
    commit: Callable[[Sequence[tuple[Task, list[int]]]], None]
    fail: Callable[[AnyItem, str], None]


class Loop:
    """One group's way through its items."""

    def __init__(
        self,
        group: Group,
        executor: Executor,
        files: Files,
        *,
        board: Board,
        deadlines: Deadlines,
        wants_to_stop: Callable[[], bool],
        finished: Callable[[Task], None],
        failed: Callable[[AnyItem, ItemError], None],
        note: Note | None = None,
        commit_every: float = 0.0,
    ) -> None:
        self.group = group
        self.executor = executor
        self.files = files
        self.clock = PhaseClock(board, deadlines, note)
        self.wants_to_stop = wants_to_stop
        self.finished = finished
        self.failed = failed
        self.every_phase = board.on_enter is not None  # faults on purpose want every phase
        self.stopped = False
        self.work = 0  # of the item in hand
        self.commit_every = commit_every
        self.synced = 0  # pieces that all ranks have on the disk
        self.agreed: deque[tuple[int, Task, list[int]]] = deque()  # and not committed yet
        self.ready: deque[tuple[Task, list[int]]] = deque()  # for the thread that commits

    def run(self, tasks: Iterable[Task]) -> None:
        """Collective. Compute and commit all `tasks`, or those before a stop was agreed on.

        Raises
        ------
        MdattnError
            The same on all ranks. Items that were committed before stay so.

        """
        self.reads = ReadAhead(tasks, self._room, self.files.read)
        self.writes: WriteBehind[Task, Enqueued, Written] = WriteBehind(
            self.files.write, self.files.sync, lag=most_behind, every=self.commit_every
        )
        try:
            current = self._advance()
            while current is not None:
                following = self._advance()  # its agreement is the barrier between two enqueues
                self._enqueue(current)
                current = following
            while self.writes.under_way:
                self._advance(drain=True)
            self._agree(None, None, self._sync_error())  # after it, all ranks have all on the disk
            self._agree(None, None, self._ledger_error(drain=True))
            self.writes.close(wait=True)
        except BaseException:
            self.writes.close(wait=False)
            raise
        finally:
            self.clock.stop()
            self.reads.close()

    def _room(self, task: Task) -> tuple[HostArray, ...]:
        """Make room in host memory for what is to be read."""
        return tuple(self.executor.host_empty(shard.shape, shard.dtype) for shard in task.reads)

    def _advance(self, *, drain: bool = False) -> Begun | None:
        """Agree on what was written and on what comes next: commit the one, begin the other."""
        if self.synced > self.writes.taken + 1:  # the disk was slow: what has gathered goes first
            self._agree(None, self._outcome("write", self.writes.oldest(synced=self.synced)))
        while True:
            ahead = self._outcome("read", None if self.stopped else next(self.reads, None))
            oldest = self.writes.oldest(synced=self.synced, drain=drain)
            agreement = self._agree(ahead, self._outcome("write", oldest))
            if ahead is None:
                return None  # a wish to stop that comes now finds nothing to stop
            if agreement.refused is not None:
                self._fail(ahead.task.item, agreement.refused)
            if agreement.stop:
                self.stopped = True
                return None
            if agreement.refused is None:
                assert ahead.stage is not None
                return self._begin(ahead.stage)

    def _outcome(self, phase: str, ready: tuple[Task, Future[S]] | None) -> Outcome[S] | None:
        """Wait for a thread. What went wrong on this rank goes into the next agreement."""
        if ready is None:
            return None
        task, future = ready
        if self.every_phase or not future.done():
            self.clock.enter(phase, task.item.name, task.item.problem.work)
        try:
            return Outcome(task, future.result())
        except Exception as error:
            failure = MdattnError.wrap(error, item=task.item.name, rank=self.group.world_rank)
            return Outcome(task, error=failure)

    def _ledger_error(self, *, drain: bool = False) -> MdattnError | None:
        """What a commit of this rank has run into; wait for all of them to drain."""
        try:
            self.writes.check(drain=drain)
        except MdattnError as error:
            return error
        return None

    def _sync_error(self) -> MdattnError | None:
        """Have all that was written on the disk; what went wrong with it on this rank."""
        self.clock.enter("write")
        try:
            self.writes.sync()
        except Exception as error:
            return MdattnError.wrap(error, rank=self.group.world_rank)
        return None

    def _agree(
        self,
        ahead: Outcome[Read] | None,
        behind: Outcome[Written] | None,
        error: MdattnError | None = None,
    ) -> Agreement:
        """Agree on the item ahead and the one behind; the barrier before and after an enqueue.

        What was agreed on before and is on all disks now is committed.
        """
        synced = self.writes.synced  # before the look at the ledger: a failure there may void it
        error = error or self._ledger_error()
        shown = ahead or behind
        name, work = (shown.task.item.name, shown.task.item.problem.work) if shown else ("", 0)
        self.clock.enter("agree", name, max(self.work, work), MEANWHILE)
        agreement = self.group.agree(
            step_of(ahead.task if ahead else None, behind.task if behind else None),
            error=_failure(behind) or error or _failure(ahead),
            refused=ahead.refused if ahead else None,
            unwritten=behind.refused if behind else None,
            word=_checksum(behind) if behind else None,
            reader=0,
            count=synced,
            stop=self.wants_to_stop(),
        )
        self.synced = agreement.least
        if behind is not None:
            self._finish(behind.task, agreement)
        self._commit()
        return agreement

    def _begin(self, read: Read) -> Begun:
        task = read.task
        self.clock.enter("begin", task.item.name, task.item.problem.work)
        return Begun(task, self.executor.begin(task.plan, *read.shards))

    def _enqueue(self, begun: Begun) -> None:
        task = begun.task
        self.work = task.item.problem.work
        self.clock.enter("enqueue", task.item.name, self.work)
        self.executor.enqueue(begun.running)
        self.writes.put(task, Enqueued(task, self.executor.collect(begun.running)))

    def _finish(self, task: Task, agreement: Agreement) -> None:
        """Take an item that all ranks have written as done, or give it up on all."""
        if agreement.unwritten is not None:
            self._fail(task.item, agreement.unwritten)
            return
        if self.group.rank == 0:
            self.agreed.append((self.writes.taken, task, list(agreement.words)))
        self.finished(task)

    def _commit(self) -> None:
        """Have items committed that are on all disks, as many at once as there are by then."""
        if not self.agreed or self.agreed[0][0] > self.synced:
            return
        while self.agreed and self.agreed[0][0] <= self.synced:
            _, task, checksums = self.agreed.popleft()
            self.ready.append((task, checksums))
        self.writes.run(self._commit_ready)

    def _commit_ready(self) -> None:
        batch = [self.ready.popleft() for _ in range(len(self.ready))]
        if batch:
            self.files.commit(batch)

    def _fail(self, item: AnyItem, error: ItemError) -> None:
        if self.group.rank == 0:
            self.writes.run(self.files.fail, item, str(error))
        self.failed(item, error)


def _failure(outcome: Outcome[Any] | None) -> MdattnError | None:
    """What ends the job."""
    return outcome.error if outcome and not outcome.refused else None


def most_behind(task: Task) -> int:
    """How many items like this one may be under way to the disk; the same on all ranks."""
    nbytes = sum(prod(each.tensor.shape) * each.dtype.itemsize for each in task.writes)
    return max(LEAST_BEHIND, min(MOST_BEHIND, SMALL_BYTES // max(1, nbytes)))


def _checksum(behind: Outcome[Written]) -> int:
    return behind.stage.checksum if behind.stage else 0


def step_of(ahead: Task | None, behind: Task | None) -> Step:
    """What the ranks must have in common: which item begins and how, and which one is committed."""
    number = behind.item.index if behind else -1
    if ahead is None:
        return Step(-1, "end", number, lambda: {"committed item": number})
    facts = ahead.plan.facts
    return Step(
        ahead.item.index,
        "begin",
        ahead.plan.digest ^ number,
        lambda: {"item": ahead.item.name, "committed item": number, **facts()},
    )
