"""Where the time went: a table for the person, ``summary.json`` for everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdattn_mpi.lockstep import launcher
from mdattn_mpi.runner.progress import duration
from mdattn_mpi.runner.provenance import provenance

if TYPE_CHECKING:
    from mdattn_mpi.runner.job import Job

PHASES = {
    "read": "waiting for shards from the dataset",
    "wait": "waiting for the other ranks",
    "exchange": "waiting for transfers",
    "compute": "attention",
    "merge": "merging partial results",
    "write": "waiting for shards of the output to be written",
}


def rank_times(phases: Mapping[str, float], timings: Mapping[str, float]) -> dict[str, float]:
    """Fold one rank's clocks into the six lines of the table, in seconds."""
    enqueue = phases.get("begin", 0.0) + phases.get("enqueue", 0.0)
    inside = sum(timings.get(name, 0.0) for name in ("exchange", "merge"))
    return {
        "read": phases.get("read", 0.0),
        "wait": phases.get("agree", 0.0),
        "exchange": timings.get("exchange", 0.0),
        "compute": timings.get("compute", max(0.0, enqueue - inside)),
        "merge": timings.get("merge", 0.0),
        "write": phases.get("write", 0.0),
    }


def time_table(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Min, mean and max over ranks of every phase, and the slowest rank by name.

    `ranks` holds for each rank ``host`` and ``seconds`` (of `rank_times`).
    """
    lines = [f"{'phase':<10}{'min':>10}{'mean':>10}{'max':>10}   slowest"]
    for phase in PHASES:
        seconds = [rank["seconds"][phase] for rank in ranks]
        slowest = max(range(len(ranks)), key=seconds.__getitem__)
        mean = sum(seconds) / len(seconds)
        lines.append(
            f"{phase:<10}{duration(min(seconds)):>10}{duration(mean):>10}"
            f"{duration(max(seconds)):>10}   rank {slowest} on {ranks[slowest]['host']}"
        )
    return "\n".join(lines)


def summarize(
    job: Job,
    ranks: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, str]],
    code: int,
) -> dict[str, Any]:
    """Everything worth keeping of a job that came to its end; `ranks` as in `time_table`."""
    elapsed = job.seconds["items"]
    finished = [item for item in job.todo if job.output and job.output.ledger.state(item) == "done"]
    return {
        "exit_code": code,
        "config": asdict(job.spec),
        **provenance(job.executor),
        "launcher": str(launcher()),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": job.seconds,
        "items": {
            "all": len(job.items),
            "done_before": len(job.items) - len(job.todo),
            "done_now": len(finished),
            "failed": list(failed),
        },
        "tokens_per_second": sum(item.problem.tokens for item in finished) / elapsed,
        "flops_per_second": sum(item.problem.flops for item in finished) / elapsed,
        "groups": list(job.schedule.reasons),
        "strategies": sorted({plan.strategy for plan in job.plans.values()}),
        "ranks": list(ranks),
    }


def closing_words(summary: Mapping[str, Any], path: Path) -> str:
    """What the person reads last: the table, what is done, what isn't, and what to do about it."""
    items, code = summary["items"], summary["exit_code"]
    done = items["done_before"] + items["done_now"]
    lines = [time_table(summary["ranks"])] if items["done_now"] else []
    lines.append(
        f"mdattn: {done} of {items['all']} items done, {items['done_now']} of them now, in "
        f"{duration(summary['seconds']['items'])}; {_rate(summary)}"
    )
    if items["failed"]:
        lines.append("mdattn: failed: " + ", ".join(each["item"] for each in items["failed"]))
    if code == 75:
        lines.append("mdattn: stopped as asked; run the same command again to resume")
    lines.append(f"mdattn: summary in {path}")
    return "\n".join(lines)


def _rate(summary: Mapping[str, Any]) -> str:
    """How fast it was: in operations, where they are known."""
    if summary["flops_per_second"]:
        return f"{summary['flops_per_second'] / 1e9:.1f} GFLOP/s"
    return f"{summary['tokens_per_second']:.1f} tokens/s"


def write_summary(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Replace ``summary.json`` in the run folder; never leaves half a file."""
    path = folder / "summary.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)
    return path
