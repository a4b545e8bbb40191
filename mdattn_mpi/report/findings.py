"""What stands out in a job's runs: the slowest items, the slowest ranks, and how fast it went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mdattn_mpi.report.phases import PHASES, THREADS, phase_of
from mdattn_mpi.report.runs import Rank, Run

# What an item goes through, each stage while others are in the other stages: by thread and phase.
STAGES = {
    "reading": (("read", "read"),),
    "computing": (("main", "enqueue"), ("write", "collect")),
    "writing": (("write", "write"), ("write", "sync")),
}

NOTHING = 0.01  # of a run, spent on waiting for others


class Slow(NamedTuple):
    """An item, and the stage of it that took longest: seconds, and on which rank."""

    item: int
    stage: str
    seconds: float
    run: int
    rank: int
    host: str


class Spread(NamedTuple):
    """How long a phase took on the ranks, in seconds, and which rank took longest."""

    thread: str
    phase: str
    least: float
    mean: float
    most: float
    slowest: Rank


def slowest_items(runs: Sequence[Run], items: int, most: int = 10) -> list[Slow]:
    """Find the items whose longest stage took longest on any rank."""
    found: list[Slow] = []
    for number, run in enumerate(runs):
        for stage, parts in STAGES.items():
            longest, where = np.zeros(items), np.zeros(items, int)
            for index, rank in enumerate(run.ranks):
                took = _stage_seconds(run, rank, parts, items)
                where[took > longest] = index
                longest = np.maximum(longest, took)
            for item in np.argsort(-longest, kind="stable")[:most].tolist():
                if longest[item]:
                    rank = run.ranks[where[item]]
                    seconds = float(longest[item])
                    found.append(Slow(item, stage, seconds, number, rank.rank, rank.host))
    by_item: dict[int, Slow] = {}
    for slow in sorted(found, key=lambda slow: -slow.seconds):
        by_item.setdefault(slow.item, slow)
    return list(by_item.values())[:most]


def _stage_seconds(
    run: Run, rank: Rank, parts: Sequence[tuple[str, str]], items: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Seconds of each item in a stage on one rank; spans that were put together don't count."""
    seconds = np.zeros(items)
    for thread, phase in parts:
        if phase in run.phases:
            spans = rank.spans[thread]
            own = (spans.phase == run.phases.index(phase)) & (spans.number == 1)
            own &= (spans.item >= 0) & (spans.item < items)
            weights = spans.length[own] / 1e6
            seconds += np.bincount(spans.item[own], weights=weights, minlength=items)
    return seconds


def seconds_of(rank: Rank, thread: str) -> dict[str, float]:
    """How long a rank's thread, or its device, was in each phase."""
    return rank.device_seconds() if thread == "device" else rank.seconds[thread]


def spreads(run: Run) -> Iterator[Spread]:
    """Compare the ranks, phase by phase."""
    for thread in THREADS:
        by_rank = [seconds_of(rank, thread) for rank in run.ranks]
        for phase in dict.fromkeys([*PHASES[thread], *(name for each in by_rank for name in each)]):
            seconds = [each.get(phase, 0.0) for each in by_rank]
            if any(seconds):
                slowest = run.ranks[max(range(len(seconds)), key=seconds.__getitem__)]
                mean = sum(seconds) / len(seconds)
                yield Spread(thread, phase, min(seconds), mean, max(seconds), slowest)


def verdict(run: Run) -> str:
    """Name the rank that the others waited for, and the one that waited most, in a sentence."""
    found = {(each.thread, each.phase): each for each in spreads(run)}
    wait, whole = found.get(("main", "agree")), run.until / 1e6
    if len(run.ranks) < 2 or wait is None or not whole:
        return ""
    if wait.most < NOTHING * whole:
        return f"No rank waited for the others for more than {100 * NOTHING:g} % of the run."
    patient = min(run.ranks, key=lambda rank: rank.seconds["main"].get("agree", 0.0))
    busiest = max(patient.seconds["main"].items(), key=lambda each: each[1] * (each[0] != "agree"))
    return (
        f"Rank {wait.slowest.rank} on {wait.slowest.host} waited longest for the others, "
        f"{100 * wait.most / whole:.1f} % of the run; rank {patient.rank} on {patient.host} "
        f"waited least, {100 * wait.least / whole:.1f} %, and was mostly in "
        f"“{phase_of('main', busiest[0]).words}”."
    )
