"""What the page's script needs to draw a timeline: compact, whatever the job's size.

A run's spans are columns of numbers, deflated and in base64. Where there are more than `MOST` of
them, neighbours that can't be told apart at a glance are put together, as the ranks themselves do.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdattn_mpi.report.phases import PHASES, THREADS, phase_of
from mdattn_mpi.report.runs import PARTS, Rank, Run
from mdattn_mpi.runner.events import THREADS as OWN_THREADS
from mdattn_mpi.runner.events import Spans
from mdattn_mpi.text import printable

MOST = 400_000  # spans of all runs: about 4 bytes of the page each
TICKS = 1 << 31  # a run lasts at most so many


def timeline_data(runs: Sequence[Run], name_of: Callable[[int], str]) -> str:
    """Everything that the script draws, as JSON without a character that HTML could take amiss."""
    packed = [_pack(run, max(1, MOST // len(runs))) for run in runs]
    used = sorted({item for _, items in packed for item in items})
    data = {
        "runs": [each for each, _ in packed],
        "items": {item: printable(name_of(item)) for item in used},
        "threads": THREADS,
        "phases": {
            thread: {name: phase_of(thread, name)._asdict() for name in names}
            for thread, names in _names(runs).items()
        },
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _names(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    every = [name for run in runs for name in run.phases]
    more = dict.fromkeys(OWN_THREADS, every)
    return {
        thread: tuple(dict.fromkeys([*PHASES[thread], *more.get(thread, ())])) for thread in THREADS
    }


def put_together(run: Run, most: int) -> dict[tuple[int, str], Spans]:
    """The spans of each rank (by its place) and thread, at most about `most` in all."""
    spans = {
        (place, thread): rank.spans[thread]
        for place, rank in enumerate(run.ranks)
        for thread in OWN_THREADS
    }
    grain = max(1, run.until // TICKS)
    while sum(len(each.start) for each in spans.values()) > most and grain < run.until:
        grain *= 2
        spans = {key: each.put_together(grain) for key, each in spans.items()}
    return spans


def _pack(run: Run, most: int) -> tuple[dict[str, Any], set[int]]:
    """A run for the script, and the items that it names."""
    lanes = put_together(run, most)
    devices = [_sampled(rank, most // max(1, 4 * len(run.ranks))) for rank in run.ranks]
    tick = max(1, -(-run.until // TICKS))
    whole = Spans(*map(np.concatenate, zip(*lanes.values(), strict=True)))
    columns: list[Any] = [
        np.concatenate([_gaps(each.start, each.length, tick) for each in lanes.values()]),
        whole.length // tick,
        np.diff(whole.item, prepend=0),
        *_sample_columns(devices, tick),
    ]
    shares = np.concatenate([_shares(each) for each in devices])
    narrow = [
        whole.phase,
        255 * whole.busy // np.maximum(whole.length, 1),
        *shares.T,
    ]
    numbers = np.minimum(whole.number, (1 << 16) - 1).astype("<u2").tobytes()
    raw = b"".join(
        [
            *(column.astype("<i4").tobytes() for column in columns),
            numbers,
            *(np.clip(column, 0, 255).astype("u1").tobytes() for column in narrow),
        ]
    )
    facts = {
        "until": run.until / 1e6,
        "tick": tick / 1e6,
        "phases": run.phases,
        "ranks": [
            {
                "rank": rank.rank,
                "host": printable(rank.host),
                **{thread: len(lanes[place, thread].start) for thread in OWN_THREADS},
                "device": len(devices[place]),
            }
            for place, rank in enumerate(run.ranks)
        ],
        "columns": b64encode(zlib.compress(raw)).decode(),
    }
    return facts, {*np.unique(whole.item[whole.item >= 0]).tolist()}


def _gaps(start: Any, length: Any, tick: int) -> Any:
    """From the end of one span to the start of the next, in ticks; rounding doesn't add up."""
    ends = start // tick + length // tick
    return start // tick - np.append(0, ends)[:-1]


def _sampled(rank: Rank, most: int) -> Any:
    """The samples of a device, neighbours added up until at most about `most` are left."""
    samples = rank.device
    while len(samples) > max(most, 100):
        pairs = samples[: len(samples) // 2 * 2].reshape(-1, 2, samples.shape[1])
        joined = pairs.sum(axis=1)
        joined[:, 0] = pairs[:, 0, 0]
        samples = np.concatenate([joined, samples[len(pairs) * 2 :]])
    return samples


def _sample_columns(devices: Sequence[Any], tick: int) -> list[Any]:
    gaps = [_gaps(each[:, 0], each[:, 1], tick) for each in devices]
    return [np.concatenate(gaps), np.concatenate([each[:, 1] // tick for each in devices])]


def _shares(samples: Any) -> Any:
    """Of 255, what part of a sample's time went into each of `PARTS`."""
    return (255 * samples[:, 2 : 2 + len(PARTS)]) // np.maximum(samples[:, 1:2], 1)
