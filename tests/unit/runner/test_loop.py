"""When the loop stops: before an item that is left, and never after the last one."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdattn_mpi.lockstep import Board, Deadlines
from mdattn_mpi.lockstep.agreement import Agreement
from mdattn_mpi.runner.loop import Files, Loop, Work


class Alone:
    """A group of one rank: it agrees with itself."""

    rank, size = 0, 1

    def agree(self, step: Any, *, error: Any, checksum: int | None, stop: bool) -> Agreement:
        assert error is None
        return Agreement(stop, () if checksum is None else (checksum,))


class Idle:
    """A backend that computes nothing."""

    def begin(self, plan: Any, *shards: Any) -> str:
        return "begun"

    def enqueue(self, running: str) -> None: ...

    def collect(self, running: str) -> str:
        return "result"


def items(count: int) -> Iterator[Work]:
    for index in range(count):
        item = SimpleNamespace(name=f"item-{index}", index=index, problem=SimpleNamespace(flops=1))
        plan = SimpleNamespace(digest=index, facts=dict)
        yield Work(cast(Any, item), cast(Any, plan), (), (), None)


def committed(count: int, stop_from: float) -> tuple[list[str], bool]:
    """Run `count` items; those that were committed, and whether the loop calls itself stopped.

    A stop is asked for from agreement number `stop_from` on.
    """
    agreements = itertools.count()
    done: list[str] = []
    loop = Loop(
        cast(Any, Alone()),
        cast(Any, Idle()),
        Files(
            read=lambda work: cast(Any, ("q", "k", "v")),
            write=lambda work: 7,
            commit=lambda work, checksums: done.append(work.item.name),
            fail=lambda item, why: None,
        ),
        board=Board(),
        deadlines=Deadlines(),
        wants_to_stop=lambda: next(agreements) >= stop_from,
        finished=lambda work: None,
        failed=lambda item, failure: None,
    )
    loop.run(items(count))
    return done, loop.stopped


def names(count: int) -> list[str]:
    return [f"item-{index}" for index in range(count)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_nobody_stops_it(count: int) -> None:
    assert committed(count, float("inf")) == (names(count), False)


# Agreements are: begin 0, begin 1, enqueued 0, begin 2, enqueued 1, begin (nothing left), …


@pytest.mark.parametrize(("stop_from", "done"), [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_it_stops_before_an_item_that_is_left(stop_from: int, done: int) -> None:
    assert committed(3, stop_from) == (names(done), True)


@pytest.mark.parametrize("stop_from", [4, 5, 6])
def test_a_wish_to_stop_that_comes_when_all_items_have_begun_stops_nothing(stop_from: int) -> None:
    assert committed(3, stop_from) == (names(3), False)
