"""How the job that writes an output is doing: what its files say, output and run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mdattn_mpi.dataset import open_output
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep import death_note
from mdattn_mpi.lockstep.board import BoardFile, pid_namespace
from mdattn_mpi.lockstep.process import WATCHDOG, Process
from mdattn_mpi.lockstep.record import ENDED, Record

SILENCE = 30.0  # seconds after which a job is called silent: it says something every ten
GOING_ON = frozenset({"queued", "starting", "running", "stopping", "silent"})

Facts = dict[str, Any]


class Queued(Protocol):
    """What a batch system knows of a job, in words, and whether it waits for its turn."""

    @property
    def waits(self) -> bool:
        """Whether it isn't running yet, or not again."""
        ...


def status(path: str, job: Queued | None = None) -> Facts:
    """Find out how the job that writes `path` is doing; `job` is what Slurm knows of it.

    Raises
    ------
    RejectedError
        There is no such output.

    """
    folder = f"{path}.run"
    records, note = BoardFile(folder).records(), death_note.read(folder)
    now = note["time"] if note else time.time()  # nothing goes on after it
    if not Path(path).is_file():
        return _without_output(path, job, records, note, now)
    with open_output(path) as output:
        entries = output.ledger.entries()
        items = output.items
        work = [(e.state, item.problem.work) for e, item in zip(entries, items, strict=True)]
        command, ranks = output.attributes.get("command", ""), output.attributes.get("ranks", 1)
    counts = {name: sum(s == name for s, _ in work) for name in ("done", "todo", "failed")}
    state = _state(records, note, counts, now)
    if job and job.waits and state != "running" and counts["todo"]:
        state = "queued"
    return {
        "path": path,
        "state": state,
        "slurm": str(job) if job else None,
        "items": {"total": len(work), **counts},
        "failed": {
            item.name: entry.reason
            for item, entry in zip(items, entries, strict=True)
            if entry.state == "failed"
        },
        **_speed(records, work, counts, now, running=state == "running"),
        **_ended(records, now),
        "ranks": [_rank(record, now) for record in records],
        "begun": {"command": str(command), "ranks": ranks},
        "death_note": note,
    }


def _without_output(
    path: str, job: Queued | None, records: Sequence[Record], note: Any, now: float
) -> Facts:
    """Look at a job that has no output yet, or not here any more."""
    facts = {"path": path, "slurm": str(job) if job else None}
    if job and (job.waits or not records):
        return {**facts, "state": "queued" if job.waits else "starting"}
    total = max((record.total for record in records), default=0)
    done = max((record.done for record in records), default=0)
    state = _state(records, note, {"todo": total - done, "failed": 0}, now)
    if state == "running" and not total:
        state = "starting"
    elif total and state not in GOING_ON:
        state = "moved"
    elif not records:
        raise RejectedError(
            "there is no such output, and no job that is going to write it",
            fix="check the path, or start the job",
            file=path,
        )
    items = {"total": total, "done": done, "todo": total - done, "failed": 0}
    return {
        **facts,
        "state": state,
        "here": False,
        **({"items": items} if total else {}),
        **_ended(records, now),
        "ranks": [_rank(record, now) for record in records],
        "death_note": note,
    }


def _state(records: Sequence[Record], note: object, counts: Mapping[str, int], now: float) -> str:
    """Name the state of the job."""
    if note:
        return "lost a rank"
    if records and any(record.state != ENDED for record in records):
        asked = any(record.stop for record in records)
        if any(record.state != ENDED and _is_gone(record) for record in records):
            return "interrupted"
        if now - max(record.heartbeat for record in records) < SILENCE:
            return "stopping" if asked else "running"
        return "interrupted" if asked else "silent"
    if counts["todo"]:
        begun = counts.get("done", 0) + counts["failed"]
        return "stopped" if records else "unfinished" if begun else "not started"
    return "finished with failures" if counts["failed"] else "finished"


def _is_gone(record: Record) -> bool:
    """Whether a rank that hasn't ended was on this host, and its watchdog is no more."""
    if (record.host, record.pid_namespace) != (os.uname().nodename, pid_namespace()):
        return False
    watchdog = Process.look(record.watchdog_pid)
    return not (watchdog and watchdog.is_alive and watchdog.name == WATCHDOG)


def _speed(
    records: Sequence[Record],
    work: Sequence[tuple[str, int]],
    counts: Mapping[str, int],
    now: float,
    *,
    running: bool,
) -> dict[str, float | None]:
    """Items a second since the job began, and the seconds to go: work left by work done."""
    unknown: dict[str, float | None] = {"items_per_second": None, "seconds_left": None}
    began = min((record.first_wall for record in records if record.first_wall), default=0.0)
    done_now = counts["done"] - min((record.first_done for record in records), default=0)
    if not running or not began or done_now <= 0 or now <= began:
        return unknown
    rate = done_now / (now - began)
    mean = sum(each for state, each in work if state == "done") / counts["done"]
    left = sum(each for state, each in work if state == "todo")
    return {"items_per_second": rate, "seconds_left": left / mean / rate}


def _ended(records: Sequence[Record], now: float) -> dict[str, float | None]:
    """How long ago the last rank left, and how long the job had worked by then, if it had."""
    if not records or any(record.state != ENDED for record in records):
        return {"ended": None, "seconds": None}
    end = max(record.since_wall for record in records)
    began = [record.first_wall for record in records if record.done > record.first_done]
    return {"ended": max(0.0, now - end), "seconds": end - min(began) if began else None}


def _rank(record: Record, now: float) -> Facts:
    return {
        "rank": record.rank,
        "host": record.host,
        "pid": record.pid,
        "device": record.device,
        "phase": "left" if record.state == ENDED else record.phase,
        "item": record.item,
        "seconds": round(max(0.0, now - record.since_wall), 1),
        "deadline": round(record.deadline - record.since, 1),
        "stopped": record.stopped,
        "heard": round(max(0.0, now - record.heartbeat), 1),
        "fault": record.fault,
    }
