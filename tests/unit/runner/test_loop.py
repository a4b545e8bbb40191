"""When the loop stops, and what an item that can't be read, or not be written, costs."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdattn_mpi.errors import ItemError, MdattnError, OutputError
from mdattn_mpi.lockstep import Board, Deadlines
from mdattn_mpi.lockstep.agreement import Agreement
from mdattn_mpi.runner.loop import Files, Loop
from mdattn_mpi.runner.work import Enqueued, Read, Task, Written


class Alone:
    """A group of one rank: it agrees with itself."""

    rank, world_rank, size = 0, 0, 1

    def agree(
        self,
        step: Any,
        *,
        error: Any,
        refused: Any,
        unwritten: Any,
        word: int | None,
        reader: int,
        count: int,
        stop: bool,
    ) -> Agreement:
        if error:
            raise error
        assert reader == self.rank
        return Agreement(stop, () if word is None else (word,), refused, unwritten, count)


class Executor:
    """Computes nothing, and keeps to the order of its calls."""

    name = "none"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, plan: Any, *shards: Any) -> str:
        assert shards == ("q", "k", "v")
        self.calls.append(f"begin {plan.digest}")
        return str(plan.digest)

    def enqueue(self, running: str) -> None:
        self.calls.append(f"enqueue {running}")

    def collect(self, running: str) -> str:
        self.calls.append(f"collect {running}")
        return running


def items(count: int) -> Iterator[Task]:
    for index in range(count):
        item = SimpleNamespace(name=f"item-{index}", index=index, problem=SimpleNamespace(work=1))
        plan = SimpleNamespace(digest=index, facts=dict)
        yield Task(cast(Any, item), cast(Any, plan), (), (), ())


class Run:
    """A loop over `count` items that ran to its end; what it did is in the attributes.

    A stop is asked for from agreement number `stop_from` on. Items in `bad` can't be read, those in
    `unwritten` not be written; those in `spoiled` came out so that they may not be.
    """

    def __init__(
        self,
        count: int,
        stop_from: float = float("inf"),
        bad: Collection[int] = (),
        unwritten: Collection[int] = (),
        spoiled: Collection[int] = (),
        commit_every: float = 0.0,
    ) -> None:
        agreements = itertools.count()
        self.bad, self.unwritten, self.spoiled = bad, unwritten, spoiled
        self.told: list[MdattnError] = []
        self.written: list[int] = []
        self.synced: list[int] = []
        self.commits = 0
        self.committed: list[str] = []
        self.failed: list[str] = []
        self.executor = Executor()
        self.loop = Loop(
            cast(Any, Alone()),
            cast(Any, self.executor),
            Files(
                read=self.read,
                write=self.write,
                sync=self.sync,
                commit=self.commit,
                fail=lambda item, why: self.failed.append(item.name),
            ),
            board=Board(),
            deadlines=Deadlines(),
            wants_to_stop=lambda: next(agreements) >= stop_from,
            finished=lambda task: None,
            failed=lambda item, error: self.told.append(error),
            commit_every=commit_every,
        )
        self.loop.run(items(count))

    def read(self, task: Task, room: Any) -> Read:
        if task.item.index in self.bad:
            raise ItemError("not a number")
        return Read(task, cast(Any, ("q", "k", "v")))

    def write(self, enqueued: Enqueued) -> Written:
        index = enqueued.task.item.index
        assert cast(Any, enqueued.download) == str(index)
        if index in self.unwritten:
            raise OutputError("disk full")
        if index in self.spoiled:
            raise ItemError("came out as NaN")
        self.written.append(index)
        return Written(enqueued.task, 7 + index)

    def sync(self) -> None:
        self.synced = list(self.written)

    def commit(self, finished: Sequence[tuple[Task, list[int]]]) -> None:
        self.commits += 1
        for task, checksums in finished:
            assert task.item.index in self.synced
            assert checksums == [7 + task.item.index]
            self.committed.append(task.item.name)


def committed(count: int, stop_from: float) -> tuple[list[str], bool]:
    """Run `count` items; those that were committed, and whether the loop calls itself stopped."""
    run = Run(count, stop_from)
    return run.committed, run.loop.stopped


def names(count: int) -> list[str]:
    return [f"item-{index}" for index in range(count)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_nobody_stops_it(count: int) -> None:
    assert committed(count, float("inf")) == (names(count), False)


# Agreements are: begin 0, begin 1, enqueued 0 and begin 2, enqueued 1 and nothing left, …


@pytest.mark.parametrize(("stop_from", "done"), [(0, 0), (1, 1), (2, 2)])
def test_it_stops_before_an_item_that_is_left(stop_from: int, done: int) -> None:
    assert committed(3, stop_from) == (names(done), True)


@pytest.mark.parametrize("stop_from", [3, 4, 5])
def test_a_wish_to_stop_that_comes_when_all_items_have_begun_stops_nothing(stop_from: int) -> None:
    assert committed(3, stop_from) == (names(3), False)


@pytest.mark.parametrize("bad", [(0,), (2,), (4,), (0, 1, 2), (2, 3, 4), range(5)])
def test_items_that_cannot_be_read_fail_and_the_others_are_committed(bad: Collection[int]) -> None:
    """The agreement that refuses an item is also the one that commits another."""
    run = Run(5, bad=bad)
    assert run.failed == [f"item-{index}" for index in bad]
    assert run.committed == [name for name in names(5) if name not in run.failed]


def test_a_bad_item_is_noted_even_when_its_agreement_stops_the_loop() -> None:
    run = Run(5, stop_from=2, bad=[2])
    assert (run.failed, run.committed, run.loop.stopped) == (["item-2"], names(2), True)


@pytest.mark.parametrize("bad", [(), (3,), (4,)])
@pytest.mark.parametrize("unwritten", range(5))
def test_an_item_that_cannot_be_written_ends_the_loop(unwritten: int, bad: Collection[int]) -> None:
    if unwritten in bad:
        bad = ()
    with pytest.raises(OutputError, match="disk full"):
        Run(5, bad=bad, unwritten=[unwritten])


@pytest.mark.parametrize("bad", [(), (1,), (4,)])
@pytest.mark.parametrize("spoiled", [(0,), (2, 3), (4,), range(5)])
def test_an_item_that_came_out_wrong_fails_alone(
    spoiled: Collection[int], bad: Collection[int]
) -> None:
    """It is noticed three items later, on the way to the file; the others are committed."""
    run = Run(5, bad=bad, spoiled=spoiled)
    lost = {*spoiled, *bad}
    assert sorted(run.failed) == [f"item-{index}" for index in sorted(lost)]
    assert run.committed == [name for name in names(5) if name not in run.failed]
    assert {error.item for error in run.told} == set(run.failed)


def test_an_item_begins_before_the_one_ahead_of_it_computes() -> None:
    calls = Run(3).executor.calls
    assert [call for call in calls if not call.startswith("collect")] == [
        "begin 0", "begin 1", "enqueue 0", "begin 2", "enqueue 1", "enqueue 2",
    ]  # fmt: skip


def test_items_are_committed_together_where_that_is_wanted() -> None:
    """Whatever was computed before it stops is committed at the end."""
    run = Run(9, commit_every=3600)
    assert (run.committed, run.commits) == (names(9), 1)
    run = Run(9, stop_from=7, commit_every=3600)
    assert (run.committed, run.commits) == (names(7), 1)
