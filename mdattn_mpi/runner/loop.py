"""The batch loop: read → agree → enqueue → agree → write → commit.

Everything on this page happens on all ranks of a group in the same order. Item i+1 is begun while
item i computes, read while item i is begun, and item i-1 is written meanwhile. An agreement, which
is also the barrier, stands before and after every enqueue: one between two enqueues is both, and is
about the item that was written as well as about the one that begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from mdattn_mpi.backends import Backend, Download, HostArray
from mdattn_mpi.dataset import Item
from mdattn_mpi.errors import ItemError, MdattnError
from mdattn_mpi.lockstep import Agreement, Board, Deadlines, Group, Step
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


class Outcome(NamedTuple):
    """What a thread made of an item: shards that were read, or the checksum of what was written."""

    work: Work | None = None
    value: Any = None
    error: MdattnError | None = None


NOTHING = Outcome()


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
        self.tell_all = board.on_enter is not None  # faults on purpose want every phase
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
            current = self._advance()
            while current is not None:
                following = self._advance()  # its agreement is the barrier between two enqueues
                self._enqueue(current)
                current = following
            while self.writes.under_way:
                self._advance(drain=True)
            self._agree(NOTHING, NOTHING, self._failed_errand(drain=True))
            self.writes.close(wait=True)
        except BaseException:
            self.writes.close(wait=False)
            raise
        finally:
            self.clock.stop()
            self.reads.close()

    def _advance(self, *, drain: bool = False) -> Work | None:
        """Agree on what was written and on what comes next: commit the one, begin the other."""
        while True:
            ahead, behind = self._take(), self._oldest(drain=drain)
            agreement = self._agree(ahead, behind, self._failed_errand())
            if behind.work is not None:
                self._finish(behind.work, agreement.checksums)
            if ahead.work is None:
                return None  # a wish to stop that comes now finds nothing to stop
            if agreement.refused is not None:
                self._refuse(ahead.work.item, agreement.refused)
            if agreement.stop:
                self.stopped = True
                return None
            if agreement.refused is None:
                return self._begin(ahead.work, ahead.value)

    def _take(self) -> Outcome:
        """Wait for the next item's shards."""
        return self._outcome("read", None if self.stopped else next(self.reads, None))

    def _oldest(self, *, drain: bool) -> Outcome:
        """Wait for the checksum of the oldest item under way, if it is its turn."""
        return self._outcome("write", self.writes.oldest(drain=drain))

    def _outcome(self, phase: str, ready: tuple[Work, Future[Any]] | None) -> Outcome:
        """Wait for a thread. What went wrong on this rank goes into the next agreement."""
        if ready is None:
            return NOTHING
        work, future = ready
        if self.tell_all or not future.done():
            self.clock.enter(phase, work.item.name, work.item.problem.flops)
        try:
            return Outcome(work, future.result())
        except Exception as error:
            failure = MdattnError.wrap(error, item=work.item.name, rank=self.group.rank)
            return Outcome(work, error=failure)

    def _failed_errand(self, *, drain: bool = False) -> MdattnError | None:
        """What a commit of this rank has run into; wait for all of them to drain."""
        try:
            self.writes.check(drain=drain)
        except MdattnError as error:
            return error
        return None

    def _agree(self, ahead: Outcome, behind: Outcome, error: MdattnError | None) -> Agreement:
        """Agree on the item ahead and the one behind; the barrier before and after an enqueue."""
        refused = ahead.error if isinstance(ahead.error, ItemError) else None
        work = ahead.work or behind.work
        name, flops = (work.item.name, work.item.problem.flops) if work else ("", 0)
        self.clock.enter("agree", name, max(self.work, flops), MEANWHILE)
        return self.group.agree(
            step_of(ahead.work, behind.work),
            error=behind.error or error or (None if refused else ahead.error),
            refused=refused,
            checksum=behind.value,
            stop=self.wants_to_stop(),
        )

    def _begin(self, work: Work, shards: Shards) -> Work:
        self.clock.enter("begin", work.item.name, work.item.problem.flops)
        work.running = self.backend.begin(work.plan, *shards)
        return work

    def _enqueue(self, work: Work) -> None:
        self.work = work.item.problem.flops
        self.clock.enter("enqueue", work.item.name, self.work)
        self.backend.enqueue(work.running)
        work.download = self.backend.collect(work.running)
        work.running = None
        self.writes.put(work)

    def _finish(self, work: Work, checksums: Sequence[int]) -> None:
        if self.group.rank == 0:
            self.writes.errand(self.files.commit, work, list(checksums))
        self.finished(work)

    def _refuse(self, item: Item, failure: ItemError) -> None:
        if self.group.rank == 0:
            self.writes.errand(self.files.fail, item, str(failure))
        self.failed(item, failure)


def step_of(ahead: Work | None, behind: Work | None) -> Step:
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
