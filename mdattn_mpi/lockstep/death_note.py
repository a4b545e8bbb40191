"""The death note: one page that says which rank was lost first, where, why, and how to go on.

``death-note.json`` is written once, by whichever watchdog comes first; ``death-note.txt`` says the
same to people, and its first paragraph goes to stderr.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdattn_mpi.errors import name_ranks
from mdattn_mpi.lockstep.launcher import Launcher
from mdattn_mpi.lockstep.record import Record
from mdattn_mpi.text import wrapped

TEXT, JSON = "death-note.txt", "death-note.json"

Note = dict[str, Any]


def compose(
    culprit: Record,
    what: str,
    records: Sequence[Record],
    *,
    stack: str = "",
    command: str = "",
) -> Note:
    """Put all that is known into one JSON object.

    `what` happened to the `culprit`, whose `stack` it is as far as it could still be written;
    `records` are those of all ranks that can be read; `command` resumes the job.
    """
    now = time.time()
    return {
        "job": culprit.job,
        "time": now,
        "rank": culprit.rank,
        "size": culprit.size,
        "host": culprit.host,
        "pid": culprit.pid,
        "device": culprit.device,
        "phase": culprit.phase,
        "item": culprit.item,
        "seconds": round(max(0.0, now - culprit.since_wall), 3),
        "what": what,
        "stack": stack,
        "waited": [
            {
                "rank": record.rank,
                "host": record.host,
                "phase": record.phase,
                "item": record.item,
                "seconds": round(max(0.0, now - record.since_wall), 3),
            }
            for record in records
            if record.rank != culprit.rank
        ],
        "done": min((record.done for record in records), default=culprit.done),
        "total": max((record.total for record in records), default=culprit.total),
        "resume": command,
        "folder": culprit.folder,
    }


def message(note: Note) -> str:
    """Say it in one paragraph, with the command to copy on a line of its own."""
    rank = f"rank {note['rank']}" if note["rank"] >= 0 else "a rank"
    place = f"host {note['host']}, pid {note['pid']}"
    if note["device"]:
        place += f", device {note['device']}"
    when = f"in phase {note['phase'] or 'start'!r}"
    if note["item"]:
        when += f" of item {note['item']!r}"
    text = (
        f"mdattn: {rank} of {note['size']} ({place}) {note['what']} {when}, "
        f"{note['seconds']:.1f} s after it began."
    )
    if note["waited"]:
        text += f" Meanwhile: {_others(note['waited'])}."
    if note["total"]:
        text += f" Finished items, at least {note['done']} of {note['total']}, are intact."
    if note["folder"]:
        text += f" More in {Path(note['folder']) / TEXT}."
    return f"{wrapped(f'{text} To go on, run the same command again:')}\n  {note['resume']}"


def _others(waited: Sequence[dict[str, Any]]) -> str:
    """Name what the others were doing, those that did the same together."""
    together: dict[str, list[dict[str, Any]]] = {}
    for other in waited:
        item = f" {other['item']!r}" if other["item"] else ""
        together.setdefault(f"{other['phase'] or 'start'}{item}", []).append(other)
    return "; ".join(
        f"{name_ranks([other['rank'] for other in others])} in {where} "
        f"for {max(other['seconds'] for other in others):.1f} s"
        for where, others in together.items()
    )


def page(note: Note) -> str:
    """Say it on one page."""
    stack = note["stack"].strip() or "(unknown)"
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(note["time"]))
    return f"{message(note)}\n\nWritten {when}.\n\nWhere the rank was:\n\n{stack}\n"


def write(folder: str | Path, note: Note) -> bool:
    """Write the note unless there is one; True if this call did.

    The JSON decides: its file is created exclusively.
    """
    try:
        file = os.open(Path(folder) / JSON, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(file, "wb", 0) as stream:  # at once: a launcher may be about to kill us
        stream.write(json.dumps(note, indent=1).encode() + b"\n")
    (Path(folder) / TEXT).write_text(page(note), "utf-8", "surrogateescape")  # paths as they are
    return True


def add(folder: str | Path, line: str) -> None:
    """Add a line to the page, if it can be written."""
    with suppress(OSError), open(Path(folder) / TEXT, "a") as file:
        file.write(f"\n{line}\n")


def read(folder: str | Path) -> Note | None:
    """Read the note in a run folder; None if there is none (yet)."""
    try:
        note = json.loads((Path(folder) / JSON).read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def put_aside(folder: str | Path, job: int) -> None:
    """Rename the note of an earlier run to ``death-note.1`` and so on; one of this job stays."""
    note = read(folder)
    if not (Path(folder) / JSON).exists() or (note and note.get("job") == job):
        return
    number = 1
    while any((Path(folder) / f"death-note.{number}.{kind}").exists() for kind in ("txt", "json")):
        number += 1
    for name, kind in ((TEXT, "txt"), (JSON, "json")):
        with suppress(OSError):  # it isn't there, or nothing can be written here
            os.replace(Path(folder) / name, Path(folder) / f"death-note.{number}.{kind}")


def again(argv: Sequence[str] = sys.orig_argv) -> str:
    """How to go on with this job, in words."""
    without = ", without --overwrite" if "--overwrite" in argv else ""
    return f"run the same command again{without}"


def resume_command(launched: Launcher, size: int, argv: Sequence[str] | None = None) -> str:
    """Guess the command line that goes on with this job: as it was, but it starts nothing over."""
    argv = sys.orig_argv if argv is None else argv
    words = ["python", *argv[1:]] if argv[1:2] == ["-m"] else [Path(argv[1]).name, *argv[2:]]
    while "--chaos" in words:
        at = words.index("--chaos")
        del words[at : at + 2]
    words = [word for word in words if word != "--overwrite"]
    start = [launched.name, "-n", str(size)] if launched.name else []
    return shlex.join([*start, *words])
