"""A job from its command line to its exit code: open, run the loop, close."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

from mdattn_mpi.lockstep import World, board, gather_together, together
from mdattn_mpi.lockstep.process import Process
from mdattn_mpi.runner.batch import run_items
from mdattn_mpi.runner.finished import finished_before, remember
from mdattn_mpi.runner.folder import (
    closing_words,
    nothing_left,
    rank_times,
    run_folder,
    summarize,
    watched_folder,
    write_summary,
)
from mdattn_mpi.runner.job import Job, add_seconds, say, tell
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.opening import (
    check_output,
    describe_plans,
    open_files,
    open_job,
    recorded_items,
)
from mdattn_mpi.runner.waits import announced_waits
from mdattn_mpi.text import show


def run_job(make_spec: Callable[[], JobSpec], world: World) -> int:
    """Collective. Run a job; return its exit code.

    Raises
    ------
    MdattnError
        The same on all ranks, with the exit code of its class.

    """
    began = perf_counter()
    spec = together(world, "arguments", make_spec)
    if spec.redo:
        spec = recorded_items(spec, world)
    with announced_waits(spec, world), watched_folder(spec, world):
        return _run(spec, world, began)


def _run(spec: JobSpec, world: World, began: float) -> int:
    launching = seconds_since_launch()
    before = finished_before(spec, world)
    if before is not None:
        count = before["items"]["all"]
        world.board.progress(count, count)
        summary = nothing_left(spec, before)
        together(world, "summary", lambda: conclude(spec, summary) if world.rank == 0 else None)
        return 0
    job = open_job(spec, world)
    try:
        say(spec, world, describe_plans(job))
        if spec.dry_run:
            check_output(job)
        working = not spec.dry_run and open_files(job)
        if working:
            opened = perf_counter()
            job.seconds = {"launching": launching, "opening": opened - began}
            run_items(job)
            job.seconds["items"] = perf_counter() - opened
        for group in job.groups:
            group.executor.close()
        return close_job(job) if working else 0
    except BaseException:
        for group in job.groups:
            group.executor.abort()
        raise


def seconds_since_launch() -> float:
    """How long ago this rank was launched: Python, MPI and the wait for the other ranks."""
    launched = Process.look(board().watchdog_pid or os.getpid())
    assert launched is not None
    return launched.age


def close_job(job: Job) -> int:
    """Collective. Report, and say how it ended."""
    world = job.world
    ranks = gather_together(world, "report", lambda: _report(job))
    stopped = [rank.pop("stopped") for rank in ranks]
    failed = {each["item"]: each for rank in ranks for each in rank.pop("failed")}
    code = 75 if any(stopped) else 1 if failed else 0

    def close() -> None:
        summary = summarize(job, ranks, list(failed.values()), code)
        if code == 0:
            remember(job, summary)
        conclude(job.spec, summary)

    together(world, "summary", lambda: close() if world.rank == 0 else None)
    return code


def conclude(spec: JobSpec, summary: dict[str, Any]) -> None:
    """Keep the summary, and tell the user."""
    path = write_summary(run_folder(spec), summary)
    if summary["exit_code"] or not spec.quiet:
        tell(closing_words(summary, path))
    if spec.json:
        show(json.dumps(summary))


def _report(job: Job) -> dict[str, Any]:
    """What rank 0 must know of this rank."""
    timings: dict[str, float] = {}
    for group in job.groups:
        add_seconds(timings, group.executor.timings())
    return {
        "host": job.world.hostname,
        "device": job.executor.describe().get("device", ""),
        "seconds": rank_times(job.phases, timings),
        "background": job.background,
        "stopped": job.stopped,
        "failed": [{"item": one.item, "why": str(one)} for one in job.failed],
    }
