"""Which items are finished. Lives inside the output, at offsets that never change."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.dataset.layout import (
    REASON_BYTES,
    STATES,
    STRATEGIES,
    AnyItem,
    State,
)
from mdattn_mpi.dataset.positioned import Region, write_exactly, writing
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import Span, TensorSpec


def ledger_columns(items: int, width: int, runs: int) -> tuple[TensorSpec, ...]:
    """Describe the datasets of a ledger, a row an item; all zeros: every item is to be done.

    `width` ranks may make an item, and each may own so many `runs` of query tokens.
    """
    return (
        TensorSpec("state", (items,), "uint8"),
        TensorSpec("crc32", (items, width), "uint32"),
        TensorSpec("spans", (items, width, runs, 2), "uint64"),
        TensorSpec("ranks", (items,), "uint32"),
        TensorSpec("strategy", (items,), "uint8"),
        TensorSpec("reason", (items,), f"S{REASON_BYTES}"),
    )


Array = np.ndarray[Any, np.dtype[Any]]

ROWS = 8192  # of the ledger that are looked at together


class Entry(NamedTuple):
    """What the ledger says about one item."""

    state: State
    strategy: str = ""
    crc32s: tuple[int, ...] = ()  # of each rank's shard
    shards: tuple[tuple[Span, ...], ...] = ()  # each rank's tokens, in their order there
    reason: str = ""

    @property
    def ranks(self) -> int:
        """How many ranks made it."""
        return len(self.crc32s)


@dataclass
class Ledger:
    """The ledger of an open output.

    An item is done or it is not: its state is written after its checksums have reached the disk,
    and those after every rank's shard has.
    """

    path: str
    fd: int
    items: tuple[AnyItem, ...]  # in the order of the rows
    columns: Mapping[str, Region]

    @property
    def width(self) -> int:
        """How many ranks an item may have."""
        return self.columns["crc32"].shape[1]

    @property
    def runs(self) -> int:
        """How many runs of query tokens a rank may own."""
        return self.columns["spans"].shape[2]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item.name: row for row, item in enumerate(self.items)}

    def state(self, item: AnyItem) -> State:
        """Say whether `item` is to be done, done, or failed."""
        return self.entry(item).state

    def entry(self, item: AnyItem) -> Entry:
        """Read all that is known of `item`."""
        row = self._rows[item.name]
        return self._entries(row, row + 1)[0]

    def entries(self) -> list[Entry]:
        """Read all that is known of every item, in order."""
        return self._entries(0, len(self.items))

    def states(self) -> list[State]:
        """Read every item's state byte, in order: quicker than `entries`, for showing progress."""
        column = self._column("state", Span(0, len(self.items)))
        return [STATES[state] if state < len(STATES) else "todo" for state in column]

    def done(self) -> Iterator[bool]:
        """Say of every item, in order, whether it is done: as `entries` does, many at once."""
        for start in range(0, len(self.items), ROWS):
            stop = min(start + ROWS, len(self.items))
            names = ("state", "crc32", "spans", "ranks", "strategy")
            columns = [self._column(name, Span(start, stop)) for name in names]
            tokens = [item.problem.tokens for item in self.items[start:stop]]
            yield from _done(np.array(tokens, np.uint64), *columns).tolist()

    def commit(
        self,
        item: AnyItem,
        crc32s: Sequence[int],
        strategy: str,
        shards: Sequence[Sequence[Span]],
    ) -> None:
        """Declare `item` done; every rank has synced its shard before.

        `crc32s` are what `Output.write` returned on each rank of the group, `shards` the tokens
        that it was given there; `strategy` is how the group shared the item.
        """
        self.commit_all([(item, crc32s, strategy, shards)])

    def commit_all(
        self, finished: Iterable[tuple[AnyItem, Sequence[int], str, Sequence[Sequence[Span]]]]
    ) -> None:
        """Declare items done, each as in `commit`, with no more syncs than for one."""
        rows = list(finished)
        for item, crc32s, strategy, shards in rows:
            self._write_row(item, crc32s, strategy, shards)
        self._set_states([item for item, *_ in rows], "done")

    def _write_row(
        self,
        item: AnyItem,
        crc32s: Sequence[int],
        strategy: str,
        shards: Sequence[Sequence[Span]],
    ) -> None:
        if not 1 <= len(crc32s) <= self.width:
            raise RejectedError(
                f"{len(crc32s)} ranks, and the ledger has room for {self.width}",
                fix="use fewer ranks, or --overwrite",
                file=self.path,
            )
        if max(map(len, shards)) > self.runs:
            raise RejectedError(
                f"a rank owns {max(map(len, shards))} runs of tokens, and the ledger has room for "
                f"{self.runs}",
                fix="use --overwrite",
                file=self.path,
            )
        checksums = np.zeros(self.width, np.uint32)
        spans = np.zeros((self.width, self.runs, 2), np.uint64)
        spans[: len(crc32s)] = item.problem.tokens  # empty, and not all zeros: a rank was there
        for rank, (crc32, runs) in enumerate(zip(crc32s, shards, strict=True)):
            checksums[rank] = crc32
            for position, run in enumerate(runs):
                spans[rank, position] = run.start, run.stop
        self._write(item, "crc32", checksums)
        self._write(item, "spans", spans)
        self._write(item, "ranks", len(crc32s))
        self._write(item, "strategy", STRATEGIES.index(strategy))
        self._write(item, "reason", b"")

    def fail(self, item: AnyItem, reason: str) -> None:
        """Note why `item` couldn't be done; the next run tries again."""
        text = reason.encode(errors="replace")[:REASON_BYTES]
        text = text.decode(errors="ignore").encode()  # may have been cut inside a character
        self._write(item, "reason", text)
        self._set_states([item], "failed")

    def reopen(self, item: AnyItem) -> None:
        """Declare `item` not done: it is to be computed again."""
        self._set_states([item], "todo")

    def _set_states(self, items: Sequence[AnyItem], state: State) -> None:
        self._sync(items[0])
        for item in items:
            self._write(item, "state", STATES.index(state))
        self._sync(items[0])

    def _write(self, item: AnyItem, name: str, row: Any) -> None:
        column, number = self.columns[name], self._rows[item.name]
        data = np.asarray(row, column.dtype).tobytes()
        ((start, _),) = column.runs((Span(number, number + 1),))
        with writing("the ledger", self.path, item.name):
            write_exactly(self.fd, start, data)

    def _sync(self, item: AnyItem) -> None:
        with writing("the ledger", self.path, item.name):
            os.fdatasync(self.fd)

    def _entries(self, start: int, stop: int) -> list[Entry]:
        names = ("state", "crc32", "spans", "ranks", "strategy", "reason")
        columns = [self._column(name, Span(start, stop)) for name in names]
        tokens = [item.problem.tokens for item in self.items[start:stop]]
        return [_entry(*row) for row in zip(tokens, *columns, strict=True)]

    def _column(self, name: str, rows: Span) -> Any:
        region = self.columns[name]
        column = np.empty(region.part((rows,)), region.dtype)
        try:
            region.read(self.fd, (rows,), column)
        except OSError as error:
            raise RejectedError(
                f"the ledger can't be read: {error}", fix="start over: --overwrite", file=self.path
            ) from error
        return column


def _entry(
    tokens: int, state: int, crc32: Any, spans: Any, ranks: int, strategy: int, reason: bytes
) -> Entry:
    """Make sense of one row; what makes none is still to be done.

    A flipped bit can't turn an item into a finished one: that has checksums and spans as well.
    """
    if state == STATES.index("todo"):
        return Entry("todo")
    if state == STATES.index("failed"):
        return Entry("failed", reason=reason.decode(errors="replace"))
    damaged = Entry("todo", reason="its entry in the ledger is damaged")
    known = state == STATES.index("done") and strategy < len(STRATEGIES)
    if not known or not 1 <= ranks <= len(crc32) or not crc32[:ranks].any():
        return damaged
    shards = tuple(
        tuple(Span(int(start), int(stop)) for start, stop in runs if stop > start)
        for runs in spans[:ranks]
    )
    there = spans.any(axis=(1, 2))
    if not there[:ranks].all() or there[ranks:].any() or crc32[ranks:].any():
        return damaged
    if not _cover(sorted(chain(*shards)), tokens):
        return damaged
    return Entry("done", STRATEGIES[strategy], tuple(int(crc) for crc in crc32[:ranks]), shards)


def _done(
    tokens: Array, state: Array, crc32: Array, spans: Array, ranks: Array, strategy: Array
) -> Array:
    """Which rows `_entry` would call done."""
    there = np.arange(crc32.shape[1]) < ranks[:, None]
    done: Array = (state == STATES.index("done")) & (strategy < len(STRATEGIES))
    done &= (ranks >= 1) & (ranks <= crc32.shape[1])
    done &= (crc32 != 0).any(1) & ((crc32 != 0) <= there).all(1)
    done &= (spans.any(axis=(2, 3)) == there).all(1)
    # By their starts, with empty ones last, each span begins where the one before it ends.
    used = spans[:, : max(1, int(ranks[done].max(initial=1)))].reshape(len(spans), -1, 2)
    starts, stops = used[..., 0], used[..., 1]
    empty = stops <= starts
    order = np.argsort(np.where(empty, np.iinfo(np.uint64).max, starts), axis=1)
    starts, stops, empty = (np.take_along_axis(x, order, 1) for x in (starts, stops, empty))
    before = np.concatenate([np.zeros_like(stops[:, :1]), stops[:, :-1]], axis=1)
    done &= ((starts == before) | empty).all(1)
    done &= np.where(empty, 0, stops).max(1) == tokens
    return done


def _cover(spans: Sequence[Span], tokens: int) -> bool:
    """Whether sorted `spans` hold every token once."""
    at = 0
    for span in spans:
        if span.start != at:
            return False
        at = span.stop
    return at == tokens
