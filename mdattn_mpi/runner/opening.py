"""Opening a job: everything is checked and agreed on before anything is computed."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mdattn_mpi.backends import Backend, backend_name, open_backend
from mdattn_mpi.dataset import Dataset, Item, create_output, open_dataset, open_output, scan_file
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep import Group, World, together
from mdattn_mpi.problem import AttentionProblem, Plan, digest_of
from mdattn_mpi.runner.dealing import RATES, deal
from mdattn_mpi.runner.job import WIDTH, Job, run_folder, say
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.log import LOGGER, open_log
from mdattn_mpi.runner.provenance import provenance
from mdattn_mpi.runner.teams import Team, memory_of_a_rank, open_teams, smallest

KINDS = 6  # kinds of item that are described one by one


def open_job(spec: JobSpec, world: World) -> Job:
    """Collective. Open dataset and backend; plan every item, or refuse before any work."""

    def dataset_facts(dataset: Dataset) -> dict[str, Any]:
        return {"dataset": dataset.path, "digest": dataset.fingerprint, "bytes": dataset.size}

    catalog = scan_once(
        world, "dataset", lambda: scan_file(spec.data, select=spec.items, allow=spec.allow)
    )
    dataset = together(
        world,
        "dataset",
        lambda: open_dataset(
            spec.data, select=spec.items, layout=spec.layout, allow=spec.allow, catalog=catalog
        ),
        dataset_facts,
    )
    name = backend_name(spec.backend, world)
    memory = smallest(world, memory_of_a_rank(name, world)) or None
    problems = [item.problem for item in dataset.items]
    schedule = together(
        world,
        "deal",
        lambda: deal(problems, world.nodes, spec.group_size, rates=RATES[name], rank_bytes=memory),
        lambda schedule: {"group sizes": schedule.signature},
    )

    def open_one(group: Group) -> Backend:
        return open_backend(
            name, group, threads=spec.threads, transfer=spec.transfer, engine=spec.engine
        )

    teams = together(world, "backend", lambda: open_teams(world, schedule, open_one))
    job = Job(spec, world, dataset, schedule, teams)
    world.board.identify(device=job.backend.describe().get("device", ""))
    for team in teams:
        items = [dataset.items[item] for item in schedule.phases[team.phase].items]
        if team.complete:
            plan_items(job, team, items)
    return job


def scan_once(world: World, phase: str, scan: Callable[[], bytes]) -> bytes:
    """Collective. Look at a file on rank 0 and give its catalog to all ranks."""
    catalog = together(world, phase, lambda: scan() if world.rank == 0 else None)
    return world.bcast_bytes(catalog)


def plan_items(job: Job, team: Team, items: Sequence[Item]) -> None:
    """Collective in the team's group. Choose a plan for each kind of item."""

    def plan() -> dict[str, Plan]:
        team.backend.prepare([item.problem for item in items], job.spec.strategy)
        by_problem: dict[AttentionProblem, Plan] = {}
        for item in items:
            if item.problem not in by_problem:
                by_problem[item.problem] = _plan(team.backend, job.spec, item)
        return {item.name: by_problem[item.problem] for item in items}

    team.plans = together(
        team.group,
        "plan",
        plan,
        lambda plans: {"plans": digest_of({n: p.digest for n, p in plans.items()})},
    )


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
    if job.schedule.signature != "all":
        entries += [("groups:", reason) for reason in job.schedule.reasons]
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
    catalog = scan_once(world, "open output", lambda: scan_file(spec.output))
    job.output = together(
        world, "open output", lambda: open_output(spec.output, writable=True, catalog=catalog)
    )
    state = job.output.ledger.state
    left = [number for number, item in enumerate(items) if state(item) != "done"]
    job.todo = [items[number] for number in left]
    job.schedule = job.schedule.only(left)
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
    spec, dataset = job.spec, job.dataset
    ranks = job.schedule.largest
    options = {
        "backend": job.backend.name,
        **spec.result_options(),
        "group_size": job.schedule.signature,
    }
    if Path(spec.output).exists() and not spec.overwrite:
        with open_output(spec.output) as output:
            output.check_resume(dataset, options, ranks=ranks, allow_change=spec.allow_change)
    else:
        create_output(
            spec.output,
            dataset.items,
            ranks=ranks,
            lse=spec.lse,
            attributes={
                **dataset.identity,
                **options,
                "ranks": ranks,
                **provenance(job.backend),
            },
            overwrite=spec.overwrite,
        )
    run_folder(spec).mkdir(exist_ok=True)
