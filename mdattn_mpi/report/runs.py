"""The runs of a job, put together from the lines of all its ranks; see `runner.events`.

Times are microseconds since the run's items began, which is the same moment on all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.runner.events import PERIOD, THREADS, Line, Spans, read_lines

PARTS = ("compute", "exchange", "merge")  # of a device's time
NOTHING = Spans(*(np.zeros(0, np.int64) for _ in Spans._fields))


class Done(NamedTuple):
    """An item that was committed, by its number, and when."""

    item: int
    at: int


class Failed(NamedTuple):
    """An item that couldn't be done, when that was found out, and why."""

    item: int
    at: int
    why: str


@dataclass
class Rank:
    """What one rank did in one run.

    Attributes
    ----------
    spans
        Of each of the `THREADS`, in order; phases are numbers of `Run.phases`.
    device
        Rows of start, length, and microseconds of each of `PARTS` in between.
    seconds
        By thread and phase.
    until
        When it was last heard of.

    """

    rank: int
    host: str = ""
    device_name: str = ""
    spans: dict[str, Spans] = field(default_factory=dict)
    device: Any = None
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    until: int = 0

    def device_seconds(self) -> dict[str, float]:
        """How long the device was busy with each of `PARTS`."""
        sums = self.device[:, 2:].sum(axis=0) / 1e6
        return dict(zip(PARTS, sums.tolist(), strict=True))


@dataclass
class Run:
    """One run of a job: from its start to its end, or to its death."""

    zero: float  # on the wall clock, seconds
    about: Mapping[str, Any]
    phases: tuple[str, ...]
    ranks: list[Rank]
    done: list[Done]
    failed: list[Failed]
    closed: bool  # in order, on all ranks
    stopped: bool
    error: str

    @property
    def until(self) -> int:
        """When any rank was last heard of."""
        return max((rank.until for rank in self.ranks), default=0)

    @property
    def end(self) -> str:
        """How it ended, in a word or two."""
        if self.error:
            return self.error
        if not self.closed:
            return f"still running, or killed: its last {PERIOD:g} s may be missing here"
        return "stopped as asked" if self.stopped else "to the end of its items"


def read_runs(folder: Path) -> list[Run]:
    """Read the runs that left something in a run folder, the earliest first."""
    by_run: dict[int, dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in read_lines(folder):
        by_run[line["run"]][line["rank"]].append(line)
    return sorted(map(_run, by_run.values()), key=lambda run: run.zero)


def _run(lines: Mapping[int, list[Line]]) -> Run:
    everything = [line for ranks in lines.values() for line in ranks]
    names = (
        name for line in everything for part in THREADS for name in line.get(part, _NONE)["phases"]
    )
    phases = tuple(dict.fromkeys(names))
    ranks = [_rank(rank, phases, lines[rank]) for rank in sorted(lines)]
    errors = [line["error"] for line in everything if "error" in line]
    about: Mapping[str, Any] = next((line["about"] for line in everything if "about" in line), {})
    return Run(
        zero=min((line["zero"] for line in everything if "zero" in line), default=0.0),
        about=about,
        phases=phases,
        ranks=ranks,
        done=sorted((Done(*each) for each in _all(everything, "done")), key=lambda d: d.at),
        failed=sorted((Failed(*each) for each in _all(everything, "failed")), key=lambda f: f.at),
        closed=all(any("ended" in line for line in lines[rank]) for rank in lines)
        and len(lines) == about.get("ranks"),
        stopped=any(line.get("stopped") for line in everything),
        error=errors[0] if errors else "",
    )


_NONE: Mapping[str, Any] = {"phases": ()}


def _all(lines: Iterable[Line], name: str) -> Iterable[Any]:
    return (each for line in lines for each in line.get(name, ()))


def _rank(number: int, phases: tuple[str, ...], lines: list[Line]) -> Rank:
    rank = Rank(number)
    for thread in THREADS:
        found = [line[thread] for line in lines if thread in line]
        rank.spans[thread] = _spans(found, phases)
        seconds: dict[str, float] = defaultdict(float)
        for each in found:
            for phase, took in zip(each["phases"], each["seconds"], strict=True):
                seconds[phase] += took
        rank.seconds[thread] = dict(seconds)
    rank.device = np.array([*_all(lines, "device")], np.int64).reshape(-1, 2 + len(PARTS))
    rank.device[:, 1] -= rank.device[:, 0]
    first = next((line for line in lines if "host" in line), {})
    rank.host, rank.device_name = first.get("host", ""), first.get("device_name", "")
    ends = [int((s.start + s.length).max()) for s in rank.spans.values() if len(s.start)]
    rank.until = max([0, *ends, *(line["ended"] for line in lines if "ended" in line)])
    return rank


def _spans(found: list[dict[str, Any]], phases: tuple[str, ...]) -> Spans:
    """Join the columns of several lines."""
    if not found:
        return NOTHING
    tables = []
    for each in found:
        length = np.array(each["length"], np.int64)
        number = [phases.index(phase) for phase in each["phases"]]
        tables.append(
            Spans(
                np.array(number)[each["phase"]],
                np.array(each["item"], np.int64),
                np.array(each["start"], np.int64),
                length,
                np.array(each.get("number", np.ones(len(length))), np.int64),
                np.array(each.get("busy", length), np.int64),
            )
        )
    return Spans(*map(np.concatenate, zip(*tables, strict=True)))
