"""The runs as a trace that Perfetto and chrome://tracing open.

Source: Trace Event Format, Google. A process is a rank of a run, a thread one of its threads; times
are microseconds since the first run's items began. What the device did is a counter, in percent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from mdattn_mpi.report.phases import THREADS, phase_of
from mdattn_mpi.report.runs import PARTS, Rank, Run
from mdattn_mpi.runner.events import THREADS as OWN_THREADS
from mdattn_mpi.text import printable

HEAD = '{"displayTimeUnit":"ms","traceEvents":[\n'

Event = dict[str, Any]


def trace(runs: Sequence[Run], name_of: Callable[[int], str]) -> Iterator[str]:
    """Write the trace piece by piece: one JSON object, an event a line."""
    yield HEAD
    comma = ""
    for event in _events(runs, name_of):
        yield comma + json.dumps(event, separators=(",", ":"))
        comma = ",\n"
    yield "\n]}\n"


def _events(runs: Sequence[Run], name_of: Callable[[int], str]) -> Iterator[Event]:
    pid = 0
    for number, run in enumerate(runs):
        ahead = f"run {number + 1}, " if runs[1:] else ""
        late = round(1e6 * (run.zero - runs[0].zero))
        for rank in run.ranks:
            pid += 1
            name = f"{ahead}rank {rank.rank} on {printable(rank.host)}"
            yield from _named(pid, name)
            for event in chain(_spans(run, rank, name_of), _device(rank)):
                yield {**event, "pid": pid, "ts": late + event["ts"]}


def _named(pid: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for tid, thread in enumerate(OWN_THREADS):
        names = {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid}
        yield {**names, "args": {"name": THREADS[thread]}}


def _spans(run: Run, rank: Rank, name_of: Callable[[int], str]) -> Iterator[Event]:
    for tid, thread in enumerate(OWN_THREADS):
        rows = zip(*(column.tolist() for column in rank.spans[thread]), strict=True)
        for phase, item, start, length, number, busy in rows:
            name = run.phases[phase]
            facts: dict[str, Any] = {"is": phase_of(thread, name).words}
            if item >= 0:
                facts["item"] = printable(name_of(item))
            if number > 1:
                facts |= {"short phases": number, "busy µs": busy}
            yield {
                "ph": "X", "cat": thread, "name": name, "tid": tid, "ts": start, "dur": length,
                "args": facts,
            }  # fmt: skip


def _device(rank: Rank) -> Iterator[Event]:
    samples = rank.device.tolist()
    if samples:
        samples.append([sum(samples[-1][:2]), 0, *(0 for _ in PARTS)])  # then it is idle
    for start, length, *parts in samples:
        percent = [round(100 * part / max(length, 1), 1) for part in parts]
        shares = dict(zip(PARTS, percent, strict=True))
        yield {"ph": "C", "name": "device, % of the time", "ts": start, "args": shares}
