"""Reading ahead and writing behind: order, depth, errors."""

from __future__ import annotations

import threading
import time

import pytest

from mdattn_mpi.runner.pipeline import ReadAhead, WriteBehind


def test_reading_is_one_task_ahead_and_in_order() -> None:
    started: list[int] = []

    def read(task: int, room: list[int]) -> int:
        assert room == [task]
        started.append(task)
        return task * 10

    reads = ReadAhead(range(4), lambda task: [task], read)
    seen = []
    for task, future in reads:
        seen.append(future.result())
        assert max(started) <= task + 2
    reads.close()
    assert seen == [0, 10, 20, 30]


def test_reading_carries_on_after_an_error() -> None:
    def read(task: int, room: None) -> int:
        return 12 // task

    reads = ReadAhead([0, 3], lambda task: None, read)
    (_, bad), (_, good) = reads
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result() == 4
    reads.close()


def test_writing_stays_behind_and_gives_results_in_order() -> None:
    writes: WriteBehind[str, int, int] = WriteBehind(lambda number: number * number, lag=2)
    assert writes.oldest(drain=True) is None
    for number in range(3):
        assert writes.oldest() is None
        writes.put(str(number), number)
    found = []
    while oldest := writes.oldest(drain=True):
        found.append((oldest[0], oldest[1].result()))
    assert found == [("0", 0), ("1", 1), ("2", 4)]
    writes.close(wait=True)


def test_another_call_comes_after_what_was_put_before_and_tells_its_error() -> None:
    gate = threading.Event()
    order: list[str] = []

    def write(name: str) -> None:
        gate.wait(10)
        order.append(name)

    def commit(name: str) -> None:
        order.append(name)
        raise OSError(name)

    writes: WriteBehind[str, str, None] = WriteBehind(write)
    writes.put("task", "shard")
    writes.run(commit, "commit")
    writes.check()  # not done yet: nothing to say
    gate.set()
    with pytest.raises(OSError, match="commit"):
        writes.check(drain=True)
    assert order == ["shard", "commit"]
    writes.close(wait=True)


def test_closing_without_waiting_drops_what_has_not_begun() -> None:
    gate = threading.Event()
    done: list[int] = []

    def write(number: int) -> None:
        gate.wait(10)
        done.append(number)

    writes: WriteBehind[int, int, None] = WriteBehind(write)
    for number in range(3):
        writes.put(number, number)
    time.sleep(0.05)
    writes.close(wait=False)
    gate.set()
    time.sleep(0.05)
    assert done == [0]
