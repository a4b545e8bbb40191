"""Say how the job that writes an output is doing, while it runs or after: items done and left,
rate, time to go, what each rank is doing and since when, and the death note if a rank was lost.
Reads files only; the job doesn't notice. Ages compare the clocks of two hosts.

  mdattn status out.h5
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdattn_mpi.text import counted, duration, printable, show

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.record import Record

EPILOG = "Exit codes: 0 answered; 2 no such output, and no job in Slurm's queue that will write it."

SILENCE = 30.0  # seconds after which a job is called silent: it says something every ten


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("output", metavar="OUT.h5", help="what the job writes")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print how the job is doing."""
    facts = status(arguments.output)
    if arguments.json:
        import json

        show(json.dumps(facts, indent=1))
    else:
        show("\n".join(_lines(facts)))
    return 0


def status(path: str) -> dict[str, Any]:
    """Find out how the job that writes `path` is doing.

    Raises
    ------
    RejectedError
        There is no such output.

    """
    from time import time

    from mdattn_mpi.dataset import open_output
    from mdattn_mpi.lockstep import death_note
    from mdattn_mpi.lockstep.board import BoardFile
    from mdattn_mpi.slurm import job_of_output

    job = job_of_output(path)
    shown = str(job) if job else None
    if job and job.waits and not Path(path).exists():
        return {"path": path, "state": "queued", "slurm": shown}
    with open_output(path) as output:
        work = [
            (entry.state, item.problem.work)
            for entry, item in zip(output.ledger.entries(), output.items, strict=True)
        ]
    counts = {name: sum(s == name for s, _ in work) for name in ("done", "todo", "failed")}
    folder = f"{path}.run"
    records, now = BoardFile(folder).records(), time()
    note = death_note.read(folder)
    now = note["time"] if note else now  # nothing goes on after it
    state = _state(records, note, counts, now)
    if job and job.waits and state != "running" and counts["todo"]:
        state = "queued"
    return {
        "path": path,
        "state": state,
        "slurm": shown,
        "items": {"total": len(work), **counts},
        **_speed(records, work, counts, now, running=state == "running"),
        "ranks": [_rank(record, now) for record in records],
        "death_note": note,
    }


def _state(records: Sequence[Record], note: object, counts: Mapping[str, int], now: float) -> str:
    """Name the state of the job."""
    from mdattn_mpi.lockstep.record import ENDED

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
        return "stopped" if records else "not started"
    return "finished with failures" if counts["failed"] else "finished"


def _is_gone(record: Record) -> bool:
    """Whether a rank that hasn't ended was on this host, and its watchdog is no more."""
    from mdattn_mpi.lockstep.board import pid_namespace
    from mdattn_mpi.lockstep.process import WATCHDOG, Process

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


def _rank(record: Record, now: float) -> dict[str, Any]:
    from mdattn_mpi.lockstep.record import ENDED

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


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    queue = [f"  Slurm's {facts['slurm']}"] if facts["slurm"] else []
    if "items" not in facts:
        yield from (f"{facts['path']}: {facts['state']}", *queue)
        return
    items = facts["items"]
    ranks = facts["ranks"]
    yield f"{facts['path']}: {facts['state']}" + (
        f", {counted(len(ranks), 'rank')}" if ranks else ""
    )
    yield from queue
    failed = f", {items['failed']} failed" if items["failed"] else ""
    done = f"{items['done']} of {counted(items['total'], 'item')} done"
    yield f"  {done}, {items['todo']} left{failed}"
    if facts["state"] in ("interrupted", "stopped"):
        yield "  to go on, run the same command again"
    if facts["items_per_second"]:
        yield (
            f"  {facts['items_per_second']:.3g} items/s, "
            f"about {duration(facts['seconds_left'])} to go"
        )
    for rank in ranks:
        yield f"  rank {rank['rank']}: {_doing(rank, facts['state'])}"
    if facts["death_note"]:
        from mdattn_mpi.lockstep.death_note import message

        yield ""
        yield from map(printable, message(facts["death_note"]).splitlines())


def _doing(rank: Mapping[str, Any], state: str) -> str:
    item = f" {rank['item']!r}" if rank["item"] and rank["phase"] != "left" else ""
    device = f", {rank['device']}" if rank["device"] else ""
    late = ", past its deadline" if rank["seconds"] > rank["deadline"] > 0 else ""
    notes = late if state == "running" and rank["phase"] != "left" else ""
    notes += ", stopped" if rank["stopped"] else ""
    notes += f", {rank['fault']}" if rank["fault"] else ""
    return printable(
        f"{rank['phase'] or 'start'}{item} for {duration(rank['seconds'])} "
        f"({rank['host']}{device}){notes}"
    )
