"""A job from its command line to its exit code: open, run the loop, close."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from mdattn_mpi.backends import Backend, open_backend
from mdattn_mpi.dataset import Dataset, Item, Output, create_output, open_dataset, open_output
from mdattn_mpi.errors import ItemError, MdattnError, RejectedError
from mdattn_mpi.lockstep import Deadlines, Step, TimeLimit, World
from mdattn_mpi.partition import partition_of
from mdattn_mpi.problem import AttentionProblem, Plan, digest_of
from mdattn_mpi.runner.finite import check_finite
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.log import LOGGER, open_log
from mdattn_mpi.runner.loop import Files, Loop, Shards, Work
from mdattn_mpi.runner.progress import Progress
from mdattn_mpi.runner.provenance import provenance
from mdattn_mpi.runner.report import closing_words, rank_times, summarize, write_summary

T = TypeVar("T")

WIDTH = 80  # columns of a narrow terminal
KINDS = 6  # kinds of item that are described one by one


@dataclass
class Job:
    """An open job: everything has been checked and agreed on, nothing computed yet."""

    spec: JobSpec
    world: World
    dataset: Dataset
    backend: Backend
    plans: dict[str, Plan]
    output: Output | None = None
    todo: list[Item] = field(default_factory=list)
    failed: list[ItemError] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # opening, and all items


def run_job(make_spec: Callable[[], JobSpec], world: World) -> int:
    """Collective. Run a job; return its exit code.

    Raises
    ------
    MdattnError
        The same on all ranks, with the exit code of its class.

    """
    began = perf_counter()
    spec = together(world, "arguments", make_spec)
    job = open_job(spec, world)
    try:
        say(world, describe_plans(job))
        if spec.dry_run:
            job.backend.close()
            return 0
        open_files(job)
        opened = perf_counter()
        loop = run_items(job)
        job.seconds = {"opening": opened - began, "items": perf_counter() - opened}
        job.backend.close()
        return close_job(job, loop)
    except BaseException:
        job.backend.abort()
        raise


def together(
    world: World,
    phase: str,
    action: Callable[[], T],
    facts: Callable[[T], dict[str, Any]] = lambda _: {},
) -> T:
    """Collective. Do something on every rank; go on together, or raise the same error together.

    `facts` tells what all ranks must have found alike.
    """
    world.board.enter(phase)
    error: MdattnError | None = None
    found: dict[str, Any] = {}
    value: T | None = None
    try:
        value = action()
        found = facts(value)
    except Exception as failure:
        error = MdattnError.wrap(failure, rank=world.rank)
    world.agree(Step(-1, phase, digest_of(found), lambda: found), error=error)
    return value  # type: ignore[return-value]


def open_job(spec: JobSpec, world: World) -> Job:
    """Collective. Open dataset and backend; plan every item, or refuse before any work."""

    def dataset_facts(dataset: Dataset) -> dict[str, Any]:
        return {"dataset": dataset.path, "digest": dataset.digest, "bytes": dataset.size}

    dataset = together(
        world,
        "dataset",
        lambda: open_dataset(spec.data, select=spec.items, layout=spec.layout, allow=spec.allow),
        dataset_facts,
    )
    backend = together(
        world,
        "backend",
        lambda: open_backend(
            spec.backend, world, threads=spec.threads, transfer=spec.transfer, engine=spec.engine
        ),
    )
    world.board.identify(device=backend.describe().get("device", ""))

    def plan() -> dict[str, Plan]:
        by_problem: dict[AttentionProblem, Plan] = {}
        for item in dataset.items:
            if item.problem not in by_problem:
                by_problem[item.problem] = _plan(backend, spec, item)
        return {item.name: by_problem[item.problem] for item in dataset.items}

    plans = together(
        world,
        "plan",
        plan,
        lambda plans: {"plans": digest_of({n: p.digest for n, p in plans.items()})},
    )
    return Job(spec, world, dataset, backend, plans)


def _plan(backend: Backend, spec: JobSpec, item: Item) -> Plan:
    try:
        return backend.plan(item.problem, spec.strategy, lse=spec.lse)
    except RejectedError as error:
        error.item, error.file = item.name, spec.data
        raise


def describe_plans(job: Job) -> str:
    """What will be computed how, and why so: one entry a kind of item."""
    counts = Counter(job.plans.values())
    about = ", ".join(f"{name} {value}" for name, value in job.backend.describe().items())
    entries = [
        ("", f"{len(job.plans)} items of {job.spec.data} on {job.world.size} ranks"),
        ("backend", f"{job.backend.name}: {about}"),
    ]
    for plan, count in counts.most_common(KINDS):
        why = plan.reasons if job.spec.dry_run else plan.reasons[:1]
        entries.append((f"{count} ×", f"{plan.problem}; {'; '.join(why)}"))
    entries += [("warning", warning) for warning in job.dataset.warnings]
    if len(counts) > KINDS:
        entries.append(("", f"and {len(counts) - KINDS} more kinds of item"))
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"mdattn: {name} " if name else "mdattn: ",
            subsequent_indent=" " * 12,
            break_long_words=False,
        )
        for name, text in entries
    )


def open_files(job: Job) -> None:
    """Collective. Make the output or open it again; find out what is still to be done."""
    spec, world, items = job.spec, job.world, job.dataset.items
    together(world, "output", lambda: _prepare_output(job) if world.rank == 0 else None)
    job.output = together(world, "open output", lambda: open_output(spec.output, writable=True))
    job.todo = [item for item in items if job.output.ledger.state(item) != "done"]
    world.board.attach(
        run_folder(spec), world.rank, world.size, job.backend.describe().get("device", "")
    )
    open_log(run_folder(spec), world.rank)
    LOGGER.info("rank %d of %d on %s: %s", world.rank, world.size, world.hostname, sys.argv)
    for plan in dict.fromkeys(job.plans.values()):
        LOGGER.info("%s: %s", plan.problem, "; ".join(plan.reasons))
    done = len(items) - len(job.todo)
    world.board.progress(done, len(items))
    if done:
        say(world, f"mdattn: resuming: {done} of {len(items)} items are done already")


def _prepare_output(job: Job) -> None:
    """Make a new output, or make sure that the one that is there belongs to this very job."""
    spec, world, dataset = job.spec, job.world, job.dataset
    options = {"backend": job.backend.name, **spec.result_options()}
    if Path(spec.output).exists() and not spec.overwrite:
        with open_output(spec.output) as output:
            output.check_resume(dataset, options, ranks=world.size, allow_change=spec.allow_change)
    else:
        create_output(
            spec.output,
            dataset.items,
            ranks=world.size,
            lse=spec.lse,
            attributes={
                **dataset.identity,
                **options,
                "ranks": world.size,
                **provenance(job.backend),
            },
            overwrite=spec.overwrite,
        )
    run_folder(spec).mkdir(exist_ok=True)


def run_folder(spec: JobSpec) -> Path:
    """Logs, summary and death note live beside the output."""
    return Path(f"{spec.output}.run")


def run_items(job: Job) -> Loop:
    """Collective. Compute what is to be done."""
    spec, world, output = job.spec, job.world, job.output
    assert output is not None
    deadlines = Deadlines(fixed=spec.deadline)
    limit = TimeLimit(spec.max_time)
    say(world, textwrap.fill(f"mdattn: deadlines: {deadlines}", WIDTH, subsequent_indent=" " * 12))
    done = len(job.dataset.items) - len(job.todo)
    progress = Progress(
        len(job.dataset.items),
        done,
        sum(item.problem.flops for item in job.todo),
        shown=world.rank == 0,
    )
    slowest = 0.0
    last = perf_counter()

    def finished(work: Work) -> None:
        nonlocal slowest, last
        now = perf_counter()
        LOGGER.info("item %s done, %.3f s after the one before", work.item.name, now - last)
        slowest, last = max(slowest, now - last), now
        progress.finished(work.item.problem)
        world.board.progress(progress.done, progress.total)

    def failed(item: Item, failure: ItemError) -> None:
        job.failed.append(failure)
        LOGGER.error("%s", failure)
        progress.skipped(f"mdattn: {failure}")

    def tasks() -> Iterator[Work]:
        for item in job.todo:
            plan = job.plans[item.name]
            owners = partition_of(plan)
            yield Work(item, plan, owners.query[world.rank], owners.kv[world.rank])

    loop = Loop(
        world,
        job.backend,
        _files(job, output),
        board=world.board,
        deadlines=deadlines,
        wants_to_stop=lambda: world.board.stop_requested or limit.is_near(2 * slowest),
        finished=finished,
        failed=failed,
    )
    try:
        loop.run(tasks())
    finally:
        progress.close()
    return loop


def _files(job: Job, output: Output) -> Files:
    dataset, spec = job.dataset, job.spec

    def read(work: Work) -> Shards:
        shards = (
            dataset.read(work.item, "query", work.query),
            dataset.read(work.item, "key", work.kv),
            dataset.read(work.item, "value", work.kv),
        )
        if spec.nonfinite == "refuse":
            check_finite(shards, (work.query, work.kv, work.kv), dataset.path, work.item.name)
        return shards

    def write(work: Work) -> int:
        assert work.download is not None
        out, lse = work.download.wait()
        work.download = None  # what it holds can be used again
        checksum = output.write(work.item, work.query, out, lse if spec.lse else None)
        output.sync()
        return checksum

    def commit(work: Work, checksums: list[int]) -> None:
        shards = partition_of(work.plan).query
        output.ledger.commit(work.item, checksums, work.plan.strategy, shards)

    return Files(read, write, commit, output.ledger.fail)


def close_job(job: Job, loop: Loop) -> int:
    """Collective. Report, and say how it ended."""
    world = job.world
    seconds = rank_times(loop.clock.seconds, job.backend.timings())
    mine = {
        "host": world.hostname,
        "device": job.backend.describe().get("device", ""),
        "seconds": seconds,
        "background": {"read": loop.reads.seconds, "write": loop.writes.seconds},
    }
    gathered = world.gather_bytes(json.dumps(mine).encode())
    code = 75 if loop.stopped else 1 if job.failed else 0
    if gathered is not None:
        summary = summarize(job, [json.loads(part) for part in gathered], code)
        path = write_summary(run_folder(job.spec), summary)
        say(world, closing_words(summary, path))
        if job.spec.json:
            print(json.dumps(summary, ensure_ascii=False))
    return code


def say(world: World, text: str) -> None:
    """Print on rank 0."""
    if world.rank == 0:
        print(text, file=sys.stderr, flush=True)
