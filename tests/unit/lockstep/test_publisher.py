"""The board by node: who writes what where, how often, and how news gets from node to node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.lockstep import Board, death_note, node, publisher
from mdattn_mpi.lockstep.board import BoardFile
from mdattn_mpi.lockstep.node import NodeBoard
from mdattn_mpi.lockstep.publisher import FETCH, LOOK, POLL, PUBLISH, Publisher
from mdattn_mpi.lockstep.record import PAGE

JOB = 77


class Clock:
    """A clock that goes forward when told to."""

    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(Clock, "now", 1000.0)
    monkeypatch.setattr(publisher.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(publisher, "process_state", lambda pid: "S")
    monkeypatch.setattr(publisher.StateFile, "read", lambda self: "S")
    monkeypatch.setattr(publisher.os, "kill", lambda pid, number: None)  # nobody is woken here
    return Clock


class Ranks:
    """The watchdogs of a job, all in this process; `nodes` has the host of each."""

    def __init__(self, folder: Path, nodes: str) -> None:
        self.clock, self.folder = Clock, folder
        self.publishers = []
        for rank, host in enumerate(nodes):
            board = Board()
            board.attach(folder, rank, len(nodes))
            board.identify(job=JOB, local_size=nodes.count(host), watchdog_pid=10_000 + rank)
            board.page.put(host=host)
            self.publishers.append(Publisher(board, os.getpid()))

    def go(self, seconds: float) -> None:
        """Let time pass; all look at the node's board in turn."""
        end = Clock.now + seconds
        while Clock.now < end:
            Clock.now += POLL
            for each in self.publishers:
                each.show(at_once=False)
                each.look()

    def close(self) -> None:
        for each in self.publishers:
            if each._node:
                each._node.hide()


@pytest.fixture
def ranks(tmp_path: Path, clock: object) -> Iterator[Any]:
    made = []

    def make(nodes: str) -> Ranks:
        made.append(Ranks(tmp_path, nodes))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each time that the run folder's file is opened."""
    opens: list[int] = []
    original, publish = BoardFile._open, BoardFile.publish

    def count(self: BoardFile) -> Any:
        opens.append(0)
        return original(self)

    def note(self: BoardFile, pages: Any, size: int) -> None:
        publish(self, pages, size)
        opens[-1] += PAGE * len(pages)

    monkeypatch.setattr(BoardFile, "_open", count)
    monkeypatch.setattr(BoardFile, "publish", note)
    return opens


def test_one_node_of_64_ranks_writes_seldom(ranks: Any, counted: list[int]) -> None:
    job = ranks("a" * 64)
    job.go(10 * PUBLISH)
    assert len(BoardFile(job.folder).records(JOB)) == 64
    counted.clear()
    job.go(60)
    assert 5 <= len(counted) <= 7  # one write in ten seconds, and no look: there is no other node
    assert sum(counted) <= 60 * 50e3


def test_a_short_job_is_seen_at_once(ranks: Any) -> None:
    job = ranks("aaa")
    job.go(2 * POLL)
    assert len(BoardFile(job.folder).records(JOB)) == 3
    job.publishers[2].board.progress(4, 9)
    job.go(3 * POLL)
    assert BoardFile(job.folder).records(JOB)[2].done == 4


def test_only_one_publishes_and_another_takes_over(ranks: Any, counted: list[int]) -> None:
    job = ranks("aaa")
    job.go(2)
    first, *others = job.publishers
    assert [each._lead is not None for each in job.publishers] == [True, False, False]
    os.close(first._node._file)  # as when its process is gone: the lock is free
    job.publishers = others
    job.go(2)
    assert [each._lead is not None for each in others] == [True, False]


def test_a_loss_reaches_another_node_in_time(ranks: Any) -> None:
    job = ranks("aabb")
    job.go(100)
    BoardFile(job.folder).announce_loss(JOB + 1)
    job.go(LOOK + 2 * POLL)
    assert not any(each.lost for each in job.publishers)
    lost = job.publishers[1]
    lost.write_note(death_note.compose(lost.board.record(), "was lost", lost.records()))
    job.go(POLL)
    assert [each.lost for each in job.publishers[:2]] == [True, True]
    job.go(LOOK + POLL)
    assert all(each.lost for each in job.publishers)


def test_who_asks_is_told_where_the_ranks_of_other_nodes_are(
    ranks: Any, counted: list[int]
) -> None:
    job = ranks("aabb")
    job.go(200)
    other = job.publishers[3]
    other.board.enter("read", "item-7")
    job.go(3 * LOOK)
    asks = job.publishers[0]
    assert asks.has_other_nodes()
    assert "item-7" not in {record.item for record in asks.records()}
    asks.ask()
    job.go(LOOK + 3 * POLL)
    assert {record.rank: record.item for record in asks.records()}[3] == "item-7"
    job.go(FETCH + LOOK)
    counted.clear()
    job.go(30)
    assert len(counted) <= 2 * (30 / LOOK + 30 / PUBLISH + 2)  # and then there is peace again


def test_a_watchdog_that_vanishes_is_missed(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ranks("aaaa")
    job.go(1)
    monkeypatch.setattr(publisher, "process_state", lambda pid: "" if pid == 10_002 else "S")
    job.go(POLL)
    assert job.publishers[0].vanished is not None
    assert job.publishers[0].vanished.rank == 2


def test_no_name_stays_behind_once_all_are_there(
    ranks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(node, "MEMORY", str(tmp_path / "memory"))
    (tmp_path / "memory").mkdir()
    job = ranks("aaa")
    for each in job.publishers[:2]:
        each.show()
        each.look()
    assert len(os.listdir(tmp_path / "memory")) == 1
    job.go(2 * POLL)
    assert os.listdir(tmp_path / "memory") == []
    assert len(job.publishers[2].records()) == 3


def test_a_place_that_is_not_ours_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: object
) -> None:
    board = Board()
    board.attach(tmp_path, 0, 1)
    first = NodeBoard(board.record())
    name = first._path.name
    first.hide()
    monkeypatch.setattr(node, "MEMORY", str(tmp_path / "memory"))
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / name).symlink_to(tmp_path / "elsewhere")
    second = NodeBoard(board.record())
    assert second._path.parent != tmp_path / "memory"
    assert not (tmp_path / "elsewhere").exists()
    second.hide()


def test_what_killed_jobs_left_is_swept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: object
) -> None:
    monkeypatch.setattr(node, "MEMORY", str(tmp_path))
    old, young = (tmp_path / f"mdattn-{os.getuid()}-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    board = Board()
    board.attach(tmp_path / "run", 0, 1)
    NodeBoard(board.record()).close()
    assert not old.exists()
    assert young.exists()


def test_who_comes_after_one_has_gone_finds_the_others(ranks: Any) -> None:
    job = ranks("aaa")
    first, second, third = job.publishers
    first.show()
    second.show()
    first.look()
    second._node.close()  # its rank is lost before the third one has come
    third.show()
    assert [record.rank for record in first.records()] == [0, 1, 2]
