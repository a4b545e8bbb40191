"""What every rank did when, in the run folder, for ``mdattn report``.

The ranks of a node append to one file, ``events-NNNN.jsonl``, numbered by the first of them: one
open a rank, no word between ranks, and no more files than nodes. A line is JSON and whole in itself
(`Line`), so a killed job leaves all but its last two seconds, and what was torn is one line.

The main thread pays for a tuple in a list. A thread takes these lists every two seconds and writes
what it makes of them. A file is bounded however many items there are: each time that a rank has
written its share of rows, the shortest span that gets a row of its own becomes twice as long, and
what is shorter is put together.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.errors import LOGGER

THREADS = ("main", "read", "write")  # of a rank; what the loop, reader and writer do
FIRST = (0.25, 0.5, 1.0)  # seconds after the start at which a rank writes a line, …
PERIOD = 2.0  # … and then between two lines
PATIENCE = 2.0  # seconds that a job which ends waits for a file system
ROWS = 512_000  # that all ranks write until the shortest span becomes twice as long …
FEWEST, MOST = 500, 8_000  # … but not fewer or more than these a rank
GRAIN = 100_000  # nanoseconds: the first length below which spans are put together
SAMPLE = 5_000_000  # nanoseconds between two looks at what the device has done

Span = tuple[str, str, int, int]  # phase, item, and nanoseconds from and to
Note = Callable[[Span], None]  # what is called with every span that is over
Line = dict[str, Any]
Column = np.ndarray[Any, np.dtype[np.int64]]


class Events:
    """One rank's events, in nanoseconds of the monotonic clock.

    Parameters
    ----------
    path
        The node's file, which is appended to; None to keep nothing.
    size
        How many ranks share the room for rows.
    rows
        The number by which an item is written down, by name.

    Attributes
    ----------
    main, read, write
        Spans of one thread each, which alone appends to its list.
    zero
        When `start` was called: all ranks do at the same moment, and times are counted from it.

    """

    def __init__(
        self, path: Path | None = None, size: int = 1, rows: Mapping[str, int] | None = None
    ) -> None:
        self.main: list[Span] = []
        self.read: list[Span] = []
        self.write: list[Span] = []
        self.zero = time.monotonic_ns()
        self._device: list[tuple[int, int, float, float, float]] = []
        self._done: list[tuple[str, int]] = []
        self._failed: list[tuple[str, int, str]] = []
        self._sampled: tuple[int, Mapping[str, float]] = (self.zero, {})
        self._rows = rows or {}
        self._share = min(max(ROWS // size, FEWEST), MOST)
        self._grain, self._room = 0, self._share
        self._over = threading.Event()
        self._who: Line = {}
        self._file = -1
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._thread = threading.Thread(target=self._go_on, name="mdattn-events", daemon=True)

    def start(self, job: int, rank: int, **facts: Any) -> None:
        """Begin the run `job`: say who this is, and count time from now on."""
        self.zero = time.monotonic_ns()
        self._who = {"run": job, "rank": rank}
        self._sampled = (self.zero, {})
        self._append({"zero": time.time(), **facts})
        self._thread.start()

    # -- what threads say --------------------------------------------------------------------------

    def done(self, item: str) -> None:
        """The item is committed; said by one rank of its group."""
        self._done.append((item, time.monotonic_ns()))

    def failed(self, item: str, why: str) -> None:
        """The item can't be done; said by one rank of its group."""
        self._failed.append((item, time.monotonic_ns(), why))

    def device_starts_at(self, seconds: Mapping[str, float]) -> None:
        """Say what an executor had spent when it was taken up."""
        self._sampled = (time.monotonic_ns(), seconds)

    def device_is_at(self, seconds: Mapping[str, float]) -> None:
        """Say what an executor has spent so far on ``compute``, ``exchange`` and ``merge``."""
        now = time.monotonic_ns()
        since, before = self._sampled
        compute, exchange, merge = (
            seconds.get(part, 0.0) - before.get(part, 0.0)
            for part in ("compute", "exchange", "merge")
        )
        self._device.append((since, now, compute, exchange, merge))
        self._sampled = (now, seconds)

    def wants_device(self) -> bool:
        """Whether it is time to say so again."""
        return time.monotonic_ns() - self._sampled[0] > SAMPLE

    # -- what is written ---------------------------------------------------------------------------

    def close(self, **facts: Any) -> None:
        """End the run and say how; a file system that hangs isn't waited for."""
        if self._thread.is_alive():
            self._over.set()
            self._thread.join(PATIENCE)
            if not self._thread.is_alive():
                ended = self._micros(time.monotonic_ns())
                self._append({**self._taken(), "ended": ended, **facts})
                self._forgo()

    def _go_on(self) -> None:
        """Write at the same moments on all ranks: what holds one up then holds up no others."""
        for due in chain(FIRST, count(PERIOD, PERIOD)):
            if self._over.wait(1e-9 * self.zero + due - time.monotonic()):
                return
            if line := self._taken():
                self._append(line)

    def _append(self, line: Line) -> None:
        """Write by one call: that is what keeps the lines of several ranks apart."""
        if self._file < 0:
            return
        raw = json.dumps({**self._who, **line}, separators=(",", ":")).encode() + b"\n"
        try:
            if os.write(self._file, raw) < len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            LOGGER.warning("no more events for a report: %s", error.strerror)
            self._forgo()

    def _forgo(self) -> None:
        """Keep nothing from now on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _taken(self) -> Line:
        """Make a line of what there is, and forget it."""
        line: Line = {}
        for name in THREADS:
            if spans := _take(getattr(self, name)):
                line[name] = self._spans(spans)
        if samples := _take(self._device):
            line["device"] = [
                [*map(self._micros, sample[:2]), *(round(1e6 * part) for part in sample[2:])]
                for sample in samples
            ]
        if done := _take(self._done):
            line["done"] = [[self._row(item), self._micros(at)] for item, at in done]
        if failed := _take(self._failed):
            line["failed"] = [[self._row(item), self._micros(at), why] for item, at, why in failed]
        return line

    def _row(self, item: str) -> int:
        return self._rows.get(item, -1)

    def _micros(self, at: int) -> int:
        return (at - self.zero) // 1000

    def _spans(self, spans: list[Span]) -> Line:
        """Columns of the spans, with those shorter than the grain put together."""
        names, items, starts, ends = zip(*spans, strict=True)
        phases = tuple(dict.fromkeys(names))
        length = np.array(ends) - starts
        whole = Spans(
            np.array([*map({name: n for n, name in enumerate(phases)}.get, names)]),
            np.array([self._rows.get(name, -1) for name in items]),
            np.array(starts) - self.zero,
            length,
            np.ones(len(spans), int),
            length,
        )
        kept = whole.put_together(self._grain)
        self._room -= len(kept.start)
        if self._room < 0:
            self._grain, self._room = max(GRAIN, 2 * self._grain), self._share
        columns = {
            "phase": kept.phase,
            "item": kept.item,
            "start": kept.start // 1000,
            "length": kept.length // 1000,
        }
        if (kept.number > 1).any():
            columns |= {"number": kept.number, "busy": kept.busy // 1000}
        seconds = np.bincount(whole.phase, weights=length, minlength=len(phases)) / 1e9
        return {
            "phases": phases,
            "seconds": seconds.round(6).tolist(),
            **{name: column.tolist() for name, column in columns.items()},
        }


def _take(found: list[Any]) -> list[Any]:
    """Empty a list that another thread appends to; return what was in it."""
    number = len(found)
    taken = found[:number]
    del found[:number]
    return taken


class Spans(NamedTuple):
    """Columns of a thread's spans, in order.

    Each is one span or a ``number`` of them put together: ``length`` is then from the start of the
    first to the end of the last, and ``busy`` is how much of it they took.
    """

    phase: Column  # numbers of names
    item: Column  # of the first; -1: none
    start: Column
    length: Column
    number: Column
    busy: Column

    def put_together(self, grain: int) -> Spans:
        """Make one of each run of spans shorter than `grain` that begin in one interval of it.

        The phase of what comes of them is the one that took most of the time.
        """
        alone, interval = self.length >= grain, self.start // max(grain, 1)
        begins = np.ones(len(self.start), bool)
        begins[1:] = alone[1:] | alone[:-1] | (interval[1:] != interval[:-1])
        if begins.all():
            return self
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(self.start)) - 1
        by_phase = [
            np.add.reduceat(self.busy * (self.phase == phase), first)
            for phase in range(self.phase.max() + 1)
        ]
        return Spans(
            np.argmax(by_phase, axis=0),
            self.item[first],
            self.start[first],
            self.start[last] + self.length[last] - self.start[first],
            np.add.reduceat(self.number, first),
            np.add.reduceat(self.busy, first),
        )


def remove_events(folder: Path) -> None:
    """Forget the runs of a job that starts over."""
    for path in folder.glob("events-*.jsonl"):
        with suppress(OSError):
            path.unlink()


def read_lines(folder: Path) -> Iterator[Line]:
    """Read all lines in a run folder, those of one rank in order; torn ones are left out."""
    for path in sorted(folder.glob("events-*.jsonl")):
        with path.open("rb") as file:
            for raw in file:
                try:
                    line = json.loads(raw)
                except ValueError:  # the disk was full, or the node went down
                    continue
                if isinstance(line, dict) and {"run", "rank"} <= line.keys():
                    yield line
