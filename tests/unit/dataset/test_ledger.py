"""The ledger: done or not, whatever happens in between."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.dataset import Item, Ledger, Output, create_output, open_output
from mdattn_mpi.dataset.ledger import _done, _entry
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Span

SHARDS = ((Span(0, 3), Span(9, 10)), (), (Span(3, 9),))


@pytest.fixture
def output(tmp_path: Path) -> Any:
    items = [Item(f"i{n}", n, AttentionProblem(10, 7, 4, 2, 8, 6)) for n in range(4)]
    create_output(tmp_path / "o.h5", items, ranks=3)
    with open_output(tmp_path / "o.h5", writable=True) as opened:
        yield opened


def fresh(output: Output) -> Ledger:
    """What another process would see."""
    return open_output(output.path).ledger


def test_done_failed_and_done_after_all(output: Output) -> None:
    a, b, c, _ = output.items
    output.ledger.commit(a, [1, 2, 3], "ulysses", SHARDS)
    output.ledger.fail(b, "shard can't be read\nbecause")
    output.ledger.fail(c, "once")
    output.ledger.commit(c, [4, 5, 6], "ring", SHARDS)
    states = [entry.state for entry in fresh(output).entries()]
    assert states == ["done", "failed", "done", "todo"]
    entry = fresh(output).entry(a)
    assert (entry.strategy, entry.ranks, entry.crc32s) == ("ulysses", 3, (1, 2, 3))
    assert entry.shards == SHARDS
    assert fresh(output).entry(b).reason == "shard can't be read\nbecause"
    assert fresh(output).entry(c).reason == ""


def test_items_are_found_by_name(output: Output) -> None:
    """The dataset numbers the selected items; the output numbers its own."""
    elsewhere = Item("i2", 0, output.items[2].problem)
    output.ledger.commit(elsewhere, [7, 8, 9], "ring", SHARDS)
    assert [entry.state for entry in fresh(output).entries()] == ["todo", "todo", "done", "todo"]


def test_long_reasons_are_cut_between_characters(output: Output) -> None:
    item = output.items[1]
    output.ledger.fail(item, "é" * 1000)
    assert fresh(output).entry(item).reason == "é" * 128
    output.ledger.fail(item, "xé" * 1000)
    assert fresh(output).entry(item).reason == "xé" * 85 + "x"
    output.ledger.fail(item, "short")
    assert fresh(output).entry(item).reason == "short"
    assert fresh(output).state(output.items[2]) == "todo"


def test_more_ranks_than_it_has_room_for(output: Output) -> None:
    ranks = output.ledger.width + 1
    shards = [[Span(0, 10)], *([[]] * (ranks - 1))]
    with pytest.raises(RejectedError, match=f"{ranks} ranks"):
        output.ledger.commit(output.items[0], [1] * ranks, "ring", shards)
    output.ledger.commit(output.items[0], [1] * (ranks - 1), "ring", shards[:-1])
    assert fresh(output).entry(output.items[0]).ranks == ranks - 1


def test_the_state_is_written_last_and_after_a_sync(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is lost when the power goes, a state never is on the disk before its checksums."""
    calls: list[Any] = []
    write, sync = os.pwrite, os.fdatasync

    def pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        return write(fd, data, offset)

    def fdatasync(fd: int) -> None:
        calls.append("sync")
        sync(fd)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    output.ledger.commit(output.items[0], [1, 2, 3], "ring", SHARDS)
    state = output.ledger.columns["state"].offset
    assert calls[-3:] == ["sync", state, "sync"]
    assert state not in calls[:-3]
    assert len(calls) >= 3 + 4


@pytest.mark.parametrize("stop", range(7))
def test_killed_at_any_write_the_item_is_not_done(
    output: Output, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    class Killed(BaseException):
        pass

    writes = 0
    write = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal writes
        if writes == stop:
            raise Killed
        writes += 1
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    try:
        output.ledger.commit(output.items[0], [1, 2, 3], "ring", SHARDS)
    except Killed:
        assert fresh(output).state(output.items[0]) == "todo"
    else:
        assert fresh(output).state(output.items[0]) == "done"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("state", 3), ("state", 255), ("crc32", 0), ("ranks", 0), ("ranks", 2)),
        *(("ranks", 4), ("ranks", 9999)),
        *(("strategy", 77), ("spans", 0), ("spans", 2**63)),
    ],
)
def test_rows_that_make_no_sense_are_still_to_be_done(
    output: Output, name: str, value: int
) -> None:
    output.ledger.commit(output.items[1], [1, 2, 3], "ring", SHARDS)
    with h5py.File(output.path, "a", locking=False) as file:
        file[f"ledger/{name}"][1] = value
    entry = fresh(output).entry(output.items[1])
    assert entry.state == "todo"
    assert "damaged" in entry.reason


def test_one_flipped_bit_makes_nothing_done(output: Output) -> None:
    with open(output.path, "r+b") as file:
        file.seek(output.ledger.columns["state"].offset)
        file.write(b"\1\1\1\1")
    assert {entry.state for entry in fresh(output).entries()} == {"todo"}


def test_a_plain_reader_finds_the_same(output: Output) -> None:
    output.ledger.commit(output.items[3], [1, 2, 3], "allgather", SHARDS)
    with h5py.File(output.path) as file:
        np.testing.assert_array_equal(file["ledger/state"][:], [0, 0, 0, 1])
        np.testing.assert_array_equal(file["ledger/crc32"][3, :4], [1, 2, 3, 0])
        assert file["ledger/spans"][3, 0].tolist() == [[0, 3], [9, 10]]
        assert file["ledger/ranks"][3] == 3


def test_many_rows_at_once_are_judged_as_one_by_one() -> None:
    """Rows as they are written, most of them with one number changed."""
    draw = np.random.default_rng()
    rows, width, runs = 4000, 4, 2
    state, strategy = np.ones(rows, np.uint8), draw.integers(0, 3, rows).astype(np.uint8)
    ranks = draw.integers(1, width + 1, rows).astype(np.uint32)
    tokens = draw.integers(1, 9, rows)
    crc32 = np.zeros((rows, width), np.uint32)
    spans = np.zeros((rows, width, runs, 2), np.uint64)
    for row in range(rows):
        crc32[row, : ranks[row]] = draw.integers(0, 3, ranks[row])
        cuts = np.sort(draw.integers(0, tokens[row] + 1, ranks[row] * runs - 1))
        ends = np.array([0, *cuts, tokens[row]])
        pairs = np.stack([ends[:-1], ends[1:]], axis=1)
        spans[row, : ranks[row]] = draw.permutation(pairs).reshape(ranks[row], runs, 2)
        spans[row, : ranks[row]][pairs_without_tokens(spans[row, : ranks[row]])] = tokens[row]
    for changed in (state, strategy, ranks, crc32, spans):
        at = draw.random(changed.shape) < 0.1 / (changed.size // rows)
        changed[at] = draw.integers(0, 6, int(at.sum()))
    singly = [
        _entry(*row, reason=b"").state == "done"
        for row in zip(tokens.tolist(), state, crc32, spans, ranks, strategy, strict=True)
    ]
    at_once = _done(tokens.astype(np.uint64), state, crc32, spans, ranks, strategy)
    assert at_once.tolist() == singly
    assert 500 < sum(singly) < rows - 500


def pairs_without_tokens(spans: Any) -> Any:
    return spans[..., 0] == spans[..., 1]


def test_which_are_done_is_read_in_blocks(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    output.ledger.commit(output.items[2], [4, 5, 6], "ring", SHARDS)
    output.ledger.fail(output.items[1], "once")
    monkeypatch.setattr("mdattn_mpi.dataset.ledger.ROWS", 3)
    assert list(output.ledger.done()) == [False, False, True, False]


def test_items_that_are_committed_together_share_two_syncs(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[list[str]] = []
    sync = os.fdatasync

    def counted(fd: int) -> None:
        sync(fd)
        syncs.append([entry.state for entry in fresh(output).entries()])

    monkeypatch.setattr(os, "fdatasync", counted)
    output.ledger.commit_all((item, [4, 5, 6], "ring", SHARDS) for item in output.items[1:])
    # Checksums and spans reach the disk before the states do.
    assert syncs == [["todo"] * 4, ["todo", "done", "done", "done"]]
