"""The board's page and its file."""

import ctypes
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.lockstep import board
from mdattn_mpi.lockstep.board import Board, BoardFile
from mdattn_mpi.lockstep.record import ENDED, MAGIC, PAGE, Page, Record

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def test_a_page_says_what_was_stored() -> None:
    page = Board()
    page.identify(job=2**63 - 1, rank=3, size=5, group=-7, device="cuda:3")
    page.enter("read", "item/Ä", 2.5)
    page.wait()
    page.progress(3, 9)
    page.progress(4, 9)
    record = page.record()
    assert (record.job, record.rank, record.size, record.group) == (2**63 - 1, 3, 5, -7)
    assert (record.phase, record.item, record.device) == ("read", "item/Ä", "cuda:3")
    assert (record.agreements, record.phases, record.waiting) == (1, 2, True)
    assert record.deadline - record.since == pytest.approx(2.5, abs=1e-6)
    assert abs(record.since_wall - time.time()) < 60
    assert (record.done, record.total, record.first_done) == (4, 9, 3)
    assert abs(record.first_wall - time.time()) < 60
    assert (record.pid, record.host) == (os.getpid(), os.uname().nodename)
    page.enter("write")
    assert not page.record().waiting
    assert page.record().item == ""
    page.end()
    page.exit(75)
    assert (page.record().state, page.record().exit_code) == (ENDED, 75)


def test_a_phase_without_a_deadline_gets_the_boards() -> None:
    page = Board()
    page.patience = 12.0
    page.enter("plan")
    assert page.record().deadline - page.record().since == pytest.approx(12, abs=1e-6)


def test_the_first_failure_stays() -> None:
    page = Board()
    page.fail("raised this")
    page.fail("and then that", late=True)
    assert (page.record().fault, page.record().late) == ("raised this", False)


def test_a_suspicion_is_over_once_the_rank_has_started() -> None:
    page = Board()
    page.suspect("got no MPI", 2)
    assert (page.record().fault, page.record().exit_code) == ("got no MPI", 2)
    page.started()
    assert page.record().fault == ""
    page.fail("raised this")
    assert page.record().fault == "raised this"


def test_a_stop_is_remembered() -> None:
    page = Board()
    assert not page.stop_requested
    page.request_stop()
    page.exit(1)
    assert page.stop_requested


@given(names, names, names)
def test_long_and_foreign_names_do_no_harm(phase: str, item: str, device: str) -> None:
    page = Board()
    page.identify(rank=1, size=2, device=device * 50)
    page.enter(phase, item * 100, 1.0)
    page.fail(item * 1000)
    record = page.record()
    assert (record.rank, record.size) == (1, 2)
    assert record.deadline - record.since == pytest.approx(1, abs=1e-6)
    assert (item * 100).startswith(record.item.rstrip("\ufffd"))
    assert Record.decode(bytes(page.page)) == record


@given(st.binary(max_size=2 * PAGE))
def test_what_is_no_page_is_none(raw: bytes) -> None:
    assert Record.decode(raw) is None
    assert Record.decode(MAGIC + raw[: ctypes.sizeof(Page) - 9]) is None


def test_records_of_earlier_runs_are_left_out(tmp_path: Path) -> None:
    file = BoardFile(tmp_path)
    assert file.records() == []
    for job, size in ((1, 3), (2, 2)):
        for rank in range(size):
            page = Board()
            page.identify(job=job, rank=rank, size=size)
            page.beat("S")
            file.publish({rank: bytes(page.page)}, size)
            time.sleep(0.002)
    assert [(record.job, record.rank) for record in file.records()] == [(2, 0), (2, 1)]
    assert [record.rank for record in file.records(1)] == [2]
    assert (tmp_path / "board").stat().st_size == 4 * PAGE


def test_a_loss_is_announced_to_its_own_run_only(tmp_path: Path) -> None:
    file = BoardFile(tmp_path)
    assert not file.notice(7).lost
    file.announce_loss(7)
    assert file.notice(7).lost
    assert not file.notice(8).lost


def test_everybody_hears_when_somebody_asks(tmp_path: Path) -> None:
    file = BoardFile(tmp_path)
    assert file.notice(7).asked == 0
    file.ask()
    file.announce_loss(7)
    file.ask()
    assert file.notice(7) == (True, 2)


def test_pages_of_many_ranks_are_written_in_their_places(tmp_path: Path) -> None:
    file = BoardFile(tmp_path)
    ranks = [0, 1, 2, 5, *range(700, 1500)]
    file.publish({rank: bytes([1 + rank % 200]) * PAGE for rank in ranks}, 1500)
    pages = file.pages()
    assert len(pages) == 1500
    for rank, page in enumerate(pages):
        assert page == bytes([(1 + rank % 200) * (rank in ranks)]) * PAGE


def test_the_process_has_one_board() -> None:
    assert board() is board()
    board().enter("anything")  # without a watchdog, it is private memory


def test_folders_and_faults_that_are_no_text(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    board = Board()
    board.attach(folder, 1, 2)
    board.fail(f"can't write {folder}")
    assert board.record().folder == folder
    assert "caf\\udce9" in board.record().fault
