"""Opening a job: everything is checked and agreed on before anything is computed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mdattn_mpi.dataset import Output, open_output, scan_file
from mdattn_mpi.dataset.index import select_items
from mdattn_mpi.errors import LOGGER
from mdattn_mpi.lockstep import World, together
from mdattn_mpi.runner.attention import open_attention
from mdattn_mpi.runner.events import remove_events
from mdattn_mpi.runner.finished import sources_of
from mdattn_mpi.runner.folder import provenance, run_folder, use_folder
from mdattn_mpi.runner.job import Job, say, scan_once
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.text import counted, quantity

KINDS = 6  # kinds of item that are described one by one
FEW_KINDS = 3  # of a job that runs: its first words and its last fit on a screen


def open_job(spec: JobSpec, world: World) -> Job:
    """Collective. Open inputs and executors; plan every item, or refuse before any work."""
    open_kind = together(world, "options", lambda: _kind_of_work(spec))
    # Before anything of it is read: what changes from now on isn't what the job has computed.
    sources = together(world, "sources", lambda: sources_of(spec) if world.rank == 0 else None)
    job = open_kind(spec, world)
    job.sources = sources
    world.board.identify(device=job.executor.describe().get("device", ""))
    return job


def _kind_of_work(spec: JobSpec) -> Callable[[JobSpec, World], Job]:
    """What opens a job of the kind that the user asks for."""
    if spec.model and not spec.model.endswith(".onnx"):
        from mdattn_mpi.runner import transformer

        transformer.check_options(spec)
        return transformer.open_transformer
    if not spec.bind and not spec.model:
        return open_attention
    from mdattn_mpi.runner.model import check_options, open_model

    check_options(spec)
    return open_model


def describe_plans(job: Job) -> str:
    """What will be computed, how and why: one entry a kind of item."""
    shapes = {item.name: job.dataset.describe(item) for item in job.items}
    counts = Counter((plan, shapes[name]) for name, plan in job.plans.items())
    about = ", ".join(f"{name} {value}" for name, value in job.executor.describe().items())
    lines = [
        f"{counted(len(job.plans), 'item')} of {job.spec.data} "
        f"on {counted(job.world.size, 'rank')}",
        f"backend {job.executor.name}: {about}",
    ]
    if job.schedule.signature != "all":
        lines += [f"groups: {reason}" for reason in job.schedule.reasons]
    in_full = job.spec.dry_run or job.spec.verbose
    shown = counts.most_common(KINDS if in_full else FEW_KINDS)
    for (plan, shape), count in shown:
        why = plan.reasons if in_full else plan.reasons[:1]
        lines.append(f"{count} × {shape}; {'; '.join(why)}")
    lines += [f"warning {warning}" for warning in job.dataset.warnings]
    if len(counts) > len(shown):
        where = "" if job.spec.dry_run else f"; {run_folder(job.spec)} has all plans"
        lines.append(f"and {counted(len(counts) - len(shown), 'more kind')} of item{where}")
    return "\n".join(f"mdattn: {line}" for line in lines)


def open_files(job: Job) -> bool:
    """Collective. Make the output or open it again; find out what is still to be done.

    False for an output that is finished and lies where nothing can be written: there is nothing to
    do, and no place to say so but the terminal.
    """
    spec, world, items = job.spec, job.world, job.items
    catalog = scan_once(world, "output", lambda: _made_output(job))
    job.output = together(world, "open output", lambda: _open_for(job, catalog))
    left = job.output.left(items)
    job.todo = [items[number] for number in left]
    if not left and _read_only(spec, world):
        say(
            spec,
            world,
            f"mdattn: nothing is left to do: {counted(len(items), 'item')} done already",
        )
        return False
    together(world, "logs", lambda: use_folder(spec, world))
    job.schedule = job.schedule.only(left)
    for plan in dict.fromkeys(job.plans.values()):
        LOGGER.info("%s: %s", plan.problem, "; ".join(plan.reasons))
    done = len(items) - len(job.todo)
    world.board.progress(done, len(items))
    if done:
        say(spec, world, f"mdattn: resuming: {done} of {counted(len(items), 'item')} done already")
    return True


def _open_for(job: Job, catalog: bytes) -> Output:
    """Open the output, which must be this job's, for writing if anything is left to do."""
    output = open_output(job.spec.output, catalog=catalog)
    if job.world.rank == 0:
        output.check_resume(job.items, _facts(job), allow_change=job.spec.allow_change)
    if output.left(job.items):
        output.allow_writing()
    return output


def check_output(job: Job) -> None:
    """Collective. Make sure, without writing anything, that the output can be made or resumed."""
    spec = job.spec

    def check() -> None:
        from mdattn_mpi.dataset.writer import check_place, file_bytes

        if spec.overwrite or not Path(spec.output).exists():
            nbytes = file_bytes(job.items, spec.lse)
            check_place(spec.output, nbytes, overwrite=spec.overwrite)
            say(spec, job.world, f"mdattn: {spec.output} will take {quantity(nbytes, 'B')}")
            return
        with open_output(spec.output) as output:
            output.check_resume(job.items, _facts(job), allow_change=spec.allow_change)
            left = len(output.left(job.items))
        say(spec, job.world, f"mdattn: {left} of {counted(len(job.items), 'item')} left to do")

    together(job.world, "output", lambda: check() if job.world.rank == 0 else None)


def _read_only(spec: JobSpec, world: World) -> bool:
    """Collective. Whether rank 0 can't write beside the output."""
    folder = os.path.dirname(os.path.abspath(spec.output))
    return not world.allgather(os.access(folder, os.W_OK))[0]


def _facts(job: Job) -> dict[str, str | int]:
    """What an output must say of its job."""
    return {
        **job.dataset.identity,
        "backend": job.executor.name,
        **job.kind.options(),
        "group_size": job.schedule.signature,
        "ranks": job.schedule.largest,
    }


def recorded_items(spec: JobSpec, world: World) -> JobSpec:
    """Collective. Have the job's items be those that its output was begun with."""

    def read() -> bytes:
        with open_output(spec.output) as output:
            return str(output.attributes.get("items", "*")).encode()

    pattern = together(world, "redo", lambda: read() if world.rank == 0 else b"")
    return replace(spec, items=world.bcast_bytes(pattern).decode())


def _reopen_items(job: Job) -> None:
    """Declare the items that are to be computed again not done."""
    with open_output(job.spec.output, writable=True) as output:
        output.check_resume(job.items, _facts(job), allow_change=job.spec.allow_change)
        for item in select_items(output.items, job.spec.redo, output.path):
            output.ledger.reopen(item)


def _made_output(job: Job) -> bytes:
    """Make a new output, unless there is one; return its catalog."""
    spec = job.spec
    if spec.redo:
        _reopen_items(job)
    elif spec.overwrite or not Path(spec.output).exists():
        from mdattn_mpi.dataset import create_output

        remove_events(run_folder(spec))
        create_output(
            spec.output,
            job.items,
            ranks=job.schedule.largest,
            lse=spec.lse,
            attributes={**_facts(job), **provenance(job.executor)},
            overwrite=spec.overwrite,
        )
    return scan_file(spec.output)
