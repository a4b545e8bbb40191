"""Opening a job: everything is checked and agreed on before anything is computed."""

from __future__ import annotations

import os
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdattn_mpi.backends import Backend, backend_name, open_backend
from mdattn_mpi.dataset import Dataset, Item, Output, create_output, open_dataset, open_output
from mdattn_mpi.devices.cuda.choice import needs_no_plans
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.estimate import PLAN, typical_costs
from mdattn_mpi.lockstep import Group, World, together
from mdattn_mpi.problem import AttentionProblem, Plan, digest_of
from mdattn_mpi.runner.job import WIDTH, Job, run_folder, say
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.log import LOGGER, open_log
from mdattn_mpi.runner.provenance import provenance
from mdattn_mpi.runner.schedule import make_schedule
from mdattn_mpi.runner.teams import Team, memory_of_a_rank, open_teams, smallest

KINDS = 6  # kinds of item that are described one by one


def open_job(spec: JobSpec, world: World) -> Job:
    """Collective. Open dataset and backend; plan every item, or refuse before any work."""

    def dataset_facts(dataset: Dataset) -> dict[str, Any]:
        return {"dataset": dataset.path, "digest": dataset.digest, "bytes": dataset.size}

    dataset = together(
        world,
        "dataset",
        lambda: open_dataset(
            spec.data,
            select=spec.items,
            layout=spec.layout,
            allow=spec.allow,
            ignore=spec.ignore,
        ),
        dataset_facts,
    )
    name = backend_name(spec.backend, world)
    memory = smallest(world, memory_of_a_rank(name, world))
    plan = 0.0 if smallest(world, needs_no_plans(name, spec.kernel)) else PLAN
    costs = typical_costs(name, memory, plan=plan)
    problems = [item.problem for item in dataset.items]
    schedule = together(
        world,
        "deal",
        lambda: make_schedule(problems, world.nodes, spec.group_size, costs),
        lambda schedule: {"group sizes": schedule.signature},
    )

    def open_one(group: Group) -> Backend:
        return open_backend(
            name,
            group,
            threads=spec.threads,
            transfer=spec.transfer,
            kernel=spec.kernel,
            engine=spec.engine,
        )

    teams = together(world, "backend", lambda: open_teams(world, schedule, open_one))
    job = Job(spec, world, dataset, schedule, teams)
    world.board.identify(device=job.backend.describe().get("device", ""))
    for team in teams:
        items = [dataset.items[item] for item in schedule.queues[team.queue].items]
        if team.complete:
            plan_items(job, team, items)
    return job


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
    shapes = {item.name: job.dataset.describe(item) for item in job.dataset.items}
    counts = Counter((plan, shapes[name]) for name, plan in job.plans.items())
    about = ", ".join(f"{name} {value}" for name, value in job.backend.describe().items())
    entries = [
        ("", f"{len(job.plans)} items of {job.spec.data} on {job.world.size} ranks"),
        ("backend", f"{job.backend.name}: {about}"),
    ]
    if job.schedule.signature != "all":
        entries += [("groups:", reason) for reason in job.schedule.reasons]
    for (plan, shape), count in counts.most_common(KINDS):
        why = plan.reasons if job.spec.dry_run else plan.reasons[:1]
        entries.append((f"{count} ×", f"{shape}; {'; '.join(why)}"))
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


def open_files(job: Job) -> bool:
    """Collective. Make the output or open it again; find out what is still to be done.

    False for an output that is finished and lies where nothing can be written: there is nothing to
    do, and no place to say so but the terminal.
    """
    spec, world, items = job.spec, job.world, job.dataset.items
    together(world, "output", lambda: _prepare_output(job) if world.rank == 0 else None)
    job.output = together(world, "open output", lambda: _open_for(spec, items))
    left = _left(job.output, items)
    job.todo = [items[number] for number in left]
    if not left and _read_only(spec, world):
        say(world, f"mdattn: all {len(items)} items are done already; nothing is left to do")
        return False
    together(world, "logs", lambda: run_folder(spec).mkdir(exist_ok=True))
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
    return True


def _left(output: Output, items: Sequence[Item]) -> list[int]:
    """The positions of the items that aren't done."""
    return [n for n, item in enumerate(items) if output.ledger.state(item) != "done"]


def _open_for(spec: JobSpec, items: Sequence[Item]) -> Output:
    """Open the output, for writing if anything is left to do."""
    output = open_output(spec.output)
    if not _left(output, items):
        return output
    output.close()
    return open_output(spec.output, writable=True)


def _read_only(spec: JobSpec, world: World) -> bool:
    """Collective. Whether rank 0 can't write beside the output."""
    writable = os.access(Path(spec.output).resolve().parent, os.W_OK)
    return world.bcast_bytes(b"%d" % writable if world.rank == 0 else None) == b"0"


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
