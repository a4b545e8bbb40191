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
    writes: WriteBehind[str, int, int] = WriteBehind(lambda number: number * number)
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


class Disk:
    """Syncs when it is let; knows how much was written by then."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.synced: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def sync(self) -> None:
        self.gate.wait(10)
        if self.broken:
            self.broken = False  # the kernel tells of it once
            raise OSError("lost")
        self.synced.append(list(self.written))


def test_what_is_written_while_the_disk_syncs_shares_the_next_sync() -> None:
    disk = Disk()
    disk.gate.clear()
    writes: WriteBehind[int, int, None] = WriteBehind(disk.written.append, disk.sync)
    for number in range(9):
        writes.put(number, number)
    assert writes.synced == 0
    disk.gate.set()
    writes.sync()
    assert writes.synced == 9
    assert disk.synced[-1] == list(range(9))
    assert len(disk.synced) <= 4  # one that was under way, one for the rest, one that was asked for
    assert writes.oldest(synced=0) is not None  # 9 are more than may be under way
    writes.close(wait=True)


def test_a_piece_that_comes_alone_is_synced_at_once() -> None:
    disk = Disk()
    writes: WriteBehind[int, int, None] = WriteBehind(disk.written.append, disk.sync)
    for number in range(3):
        writes.put(number, number)
        assert writes.oldest(synced=number) is None
        writes.run(lambda: None)
        writes.check(drain=True)  # the thread has nothing to do
        assert writes.synced == number + 1
        found = writes.oldest(synced=writes.synced)
        assert found is not None
        assert found[0] == number
    writes.close(wait=True)


def test_pieces_are_synced_just_every_so_often_where_that_is_wanted() -> None:
    disk = Disk()
    writes: WriteBehind[int, int, None] = WriteBehind(disk.written.append, disk.sync, every=3600)
    for number in range(50):
        writes.put(number, number)
    writes.run(lambda: None)
    writes.check(drain=True)
    assert (writes.synced, disk.synced) == (0, [])
    writes.sync()
    assert (writes.synced, disk.synced) == (50, [list(range(50))])
    writes.close(wait=True)


def test_after_a_sync_that_failed_nothing_counts_as_synced_any_more() -> None:
    """What it didn't write is lost, and a later sync has nothing to say of it."""
    disk = Disk()
    disk.broken = True
    writes: WriteBehind[int, int, None] = WriteBehind(disk.written.append, disk.sync)
    writes.put(0, 0)
    found = writes.oldest(drain=True)
    assert found is not None
    with pytest.raises(OSError, match="lost"):
        found[1].result()
    writes.put(1, 1)
    with pytest.raises(OSError, match="lost"):
        writes.sync()
    assert (writes.synced, disk.synced) == (0, [])
    writes.close(wait=True)
