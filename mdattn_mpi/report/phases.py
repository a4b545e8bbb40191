"""What the phases of a rank's threads mean, in words, and the colour that each has in charts."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """A phase as a report shows it; `colour` names one of the style sheet."""

    words: str
    colour: str


PHASES: dict[str, dict[str, Phase]] = {
    "main": {
        "enqueue": Phase("enqueue: computes, or asks the device to", "compute"),
        "begin": Phase("begin: upload and first transfers of the next item", "begin"),
        "agree": Phase("agree: waits for the other ranks", "agree"),
        "read": Phase("waits for its input", "read"),
        "write": Phase("waits for its output to be written", "write"),
        "claim": Phase("waits for an item to do", "claim"),
    },
    "read": {"read": Phase("reads its shard", "read")},
    "write": {
        "collect": Phase("waits for the device, and downloads", "collect"),
        "write": Phase("writes its shard", "write"),
        "sync": Phase("syncs it to the disk", "sync"),
        "commit": Phase("commits the item", "commit"),
    },
    "device": {
        "compute": Phase("computes", "compute"),
        "exchange": Phase("transfers that nothing hides", "exchange"),
        "merge": Phase("merges partial results", "merge"),
    },
}
THREADS = {
    "main": "main thread",
    "read": "reader thread",
    "write": "writer thread",
    "device": "device",
}


def phase_of(thread: str, name: str) -> Phase:
    """Say what a phase is; one that nobody has described is called by its name."""
    return PHASES[thread].get(name, Phase(name, "other"))
