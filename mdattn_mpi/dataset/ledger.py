"""Which items are finished. Lives inside the output, at offsets that never change."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.dataset.layout import (
    RANK_SPANS,
    REASON_BYTES,
    STATES,
    STRATEGIES,
    AnyItem,
    State,
)
from mdattn_mpi.dataset.positioned import Region, read_exactly, write_exactly
from mdattn_mpi.errors import OutputError, RejectedError
from mdattn_mpi.problem import Span


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
        column = self._column("state", 0, len(self.items), "<u1")
        return [STATES[state] if state < len(STATES) else "todo" for state in column]

    def commit(
        self,
        item: AnyItem,
        crc32s: Sequence[int],
        strategy: str,
        shards: Sequence[Sequence[Span]],
    ) -> None:
        """Declare `item` done; every rank has synced its shard before.

        Parameters
        ----------
        item
            An item of this name.
        crc32s
            What `Output.write` returned on each rank of the group.
        strategy
            How the group shared the item.
        shards
            The tokens of each rank, as they were given to `Output.write`.

        """
        if not 1 <= len(crc32s) <= self.width:
            raise RejectedError(
                f"{len(crc32s)} ranks, and the ledger has room for {self.width}",
                fix="use fewer ranks, or --overwrite",
                file=self.path,
            )
        checksums = np.zeros(self.width, "<u4")
        spans = np.zeros((self.width, RANK_SPANS, 2), "<u8")
        spans[: len(crc32s)] = item.problem.tokens  # empty, and not all zeros: a rank was there
        for rank, (crc32, runs) in enumerate(zip(crc32s, shards, strict=True)):
            checksums[rank] = crc32
            for position, run in enumerate(runs):
                spans[rank, position] = run.start, run.stop
        self._write(item, "crc32", checksums)
        self._write(item, "spans", spans)
        self._write(item, "ranks", np.array(len(crc32s), "<u4"))
        self._write(item, "strategy", np.array(STRATEGIES.index(strategy), "<u1"))
        self._write(item, "reason", np.zeros(REASON_BYTES, "u1"))
        self._set_state(item, "done")

    def fail(self, item: AnyItem, reason: str) -> None:
        """Note why `item` couldn't be done; the next run tries again."""
        text = reason.encode(errors="replace")[:REASON_BYTES]
        text = text.decode(errors="ignore").encode()  # may have been cut inside a character
        self._write(item, "reason", np.frombuffer(text.ljust(REASON_BYTES, b"\0"), "u1"))
        self._set_state(item, "failed")

    def _set_state(self, item: AnyItem, state: State) -> None:
        self._sync(item)
        self._write(item, "state", np.array(STATES.index(state), "<u1"))
        self._sync(item)

    def _write(self, item: AnyItem, name: str, row: np.ndarray[Any, Any]) -> None:
        try:
            start = self.columns[name].offset + self._rows[item.name] * row.nbytes
            write_exactly(self.fd, start, row.tobytes())
        except OSError as error:
            raise self._failed(item, error) from error

    def _sync(self, item: AnyItem) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise self._failed(item, error) from error

    def _failed(self, item: AnyItem, error: OSError) -> OutputError:
        return OutputError(
            f"the ledger can't be written: {error.strerror or error}",
            fix="free some space or mend the filesystem, then run the same command again",
            file=self.path,
            item=item.name,
        )

    def _entries(self, start: int, stop: int) -> list[Entry]:
        state = self._column("state", start, stop, "<u1")
        crc32 = self._column("crc32", start, stop, "<u4", self.width)
        spans = self._column("spans", start, stop, "<u8", self.width, RANK_SPANS, 2)
        ranks = self._column("ranks", start, stop, "<u4")
        strategy = self._column("strategy", start, stop, "<u1")
        reason = self._column("reason", start, stop, f"S{REASON_BYTES}")
        tokens = [item.problem.tokens for item in self.items[start:stop]]
        return [
            _entry(*row)
            for row in zip(tokens, state, crc32, spans, ranks, strategy, reason, strict=True)
        ]

    def _column(self, name: str, start: int, stop: int, dtype: str, *row: int) -> Any:
        column = np.empty((stop - start, *row), dtype)
        try:
            offset = self.columns[name].offset + start * prod(row) * column.itemsize
            read_exactly(self.fd, offset, column)
        except OSError as error:
            raise RejectedError(
                f"the ledger can't be read: {error}", fix="start anew: --overwrite", file=self.path
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


def _cover(spans: Sequence[Span], tokens: int) -> bool:
    """Whether sorted `spans` hold every token once."""
    at = 0
    for span in spans:
        if span.start != at:
            return False
        at = span.stop
    return at == tokens
