"""The whole job against the slowest of its parts.

Time a whole batch job, and the same job with all but one of its parts left out: reading every shard
from page cache, computing from memory, writing every shard and syncing it. A job can't be faster
than the slowest of them; wall / slowest says how much is lost.

  mpirun -n 2 mdattn bench job -b cuda --folder /local/scratch

Items take turns through the lengths, head dims and masks that are named, and are computed in the
order of the job, the most expensive first; --mixed is 18 lengths from 4k to 60k. The first pass of
computing pays for what a length costs when it comes first; the time of the kernels is the GPU's
own, merges left out, in a second pass.
With --group-sizes, the whole job runs once for each, on newly opened executors.

  mpirun -n 2 mdattn bench job -b cuda --mixed --items 24 --q-heads 16 --kv-heads 4 --causal \
      --group-sizes 1,2,auto
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import report
from mdattn_mpi.bench.options import add_folder, add_shapes, problems
from mdattn_mpi.problem import AttentionProblem

if TYPE_CHECKING:
    from mdattn_mpi.backends import HostArray
    from mdattn_mpi.dataset import AnyItem
    from mdattn_mpi.lockstep import World
    from mdattn_mpi.runner.job import Job
    from mdattn_mpi.runner.jobspec import JobSpec
    from mdattn_mpi.runner.loop import Files
    from mdattn_mpi.runner.work import Enqueued, Task, Written

PARTS = ("reading", "computing", "writing")
MIXED = tuple(4096 + 3373 * number for number in range(18))  # tokens: to 61437, most of them odd


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare how the job computes, and what."""
    add = parser.add_argument
    add("-b", "--backend", default="auto", metavar="NAME", help="default: auto")
    add("-s", "--strategy", default="auto", metavar="NAME", help="default: auto")
    add("--items", type=int, default=16, metavar="N", help="how many (default: 16)")
    add("--kernel", default="auto", metavar="NAME", help="on GPUs: auto (default), cudnn, flash")
    add("--group-sizes", default="", metavar="P,P", help="whole jobs to compare: 1,2,auto")
    add_shapes(parser, lengths=(65536,), q_heads=32)
    add("--mixed", dest="lengths", action="store_const", const=MIXED, help="18 lengths")
    add_folder(parser)


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Measure; rank 0 prints."""
    from mdattn_mpi.lockstep import together
    from mdattn_mpi.runner.jobspec import JobSpec

    kinds = list(problems(arguments))
    base = arguments.folder or tempfile.gettempdir()
    folder = Path(base) / f"mdattn-bench-{world.job:016x}"
    data, out = folder / "data.h5", folder / "out.h5"

    def prepare() -> None:
        if world.rank == 0:
            folder.mkdir(parents=True)
            make_dataset(data, [kinds[n % len(kinds)] for n in range(arguments.items)])

    try:
        together(world, "dataset", prepare)
        spec = JobSpec(
            str(data),
            str(out),
            backend=arguments.backend,
            strategy=arguments.strategy,
            kernel=arguments.kernel,
            nonfinite="pass",
            overwrite=True,
        )
        seconds, facts = _measure(world, spec)
        sizes = [size for size in arguments.group_sizes.split(",") if size]
        groups = {size: _whole(world, replace(spec, group_size=size)) for size in sizes}
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if world.rank == 0:
        slowest = max(PARTS, key=seconds.__getitem__)
        ratio = seconds["whole job"] / seconds[slowest]
        rows = [(name, f"{time:.3f} s") for name, time in seconds.items()]
        rows.append((f"whole job / {slowest}", f"{ratio:.3f}"))
        figures = {"seconds": seconds, "slowest": slowest, "ratio": ratio, "groups": groups}
        if seconds["kernels"]:
            figures["computing"] = seconds["computing"] / seconds["kernels"]
            rows.append(("computing / kernels", f"{figures['computing']:.3f}"))
        rows += [(f"whole job, groups of {size}", f"{time:.3f} s") for size, time in groups.items()]
        what = f"{len(kinds)} shapes, " if kinds[1:] else ""
        facts["job"] = f"{arguments.items} items of {what}{kinds[-1]} on {world.size} ranks"
        report(figures, rows, facts, as_json=arguments.json)


def make_dataset(path: Path, kinds: Sequence[AttentionProblem]) -> None:
    """Write random items, the same block of numbers again and again.

    Drawing them all, as `mdattn make-data` does, would take longer than measuring.
    """
    import numpy as np

    from mdattn_mpi.dataset import NUMPY, TENSORS, DatasetWriter, Item
    from mdattn_mpi.dataset.making import shapes

    items = [Item(f"item{number}", number, problem) for number, problem in enumerate(kinds)]
    block = np.random.default_rng().standard_normal(1 << 24, np.float32)
    block = block.astype(NUMPY[kinds[0].dtype])
    with DatasetWriter(path, items) as dataset:
        for item in items:
            for tensor in TENSORS:
                left = prod(shapes(item.problem)[tensor])
                while left:
                    dataset.append(item, tensor, block[: min(left, block.size)])
                    left -= min(left, block.size)


def _measure(world: World, spec: JobSpec) -> tuple[dict[str, float], dict[str, str]]:
    """Collective. Seconds of the whole job and of each part alone, the slowest rank's; facts."""
    from mdattn_mpi.runner.batch import files_of, run_items
    from mdattn_mpi.runner.events import Events
    from mdattn_mpi.runner.opening import open_files, open_job

    job = open_job(spec, world)
    open_files(job)
    assert job.output is not None
    files = files_of(job, job.output, Events())
    memory, timings = _in_memory(job, files), job.executor.timings
    items = in_order(job)
    parts: dict[str, Callable[[], None]] = {
        "warm-up": lambda: _compute(job, memory, items[-2:]),
        "computing": lambda: _compute(job, memory, items),
        "computing again": lambda: _compute(job, memory, items),
        "reading": lambda: _read(job, files),
        "writing": lambda: _write(job, files),
        "whole job": lambda: run_items(job),
    }
    seconds, kernels = {}, 0.0
    for name, part in parts.items():
        world.board.enter(name)
        world.barrier()
        before, began = timings(), perf_counter()
        part()
        world.barrier()
        seconds[name] = perf_counter() - began
        if name == "computing again":
            after = timings()
            kernels = sum(
                sign * (after[kind] - before[kind])
                for kind, sign in (("compute", 1), ("merge", -1))
            )
    seconds["kernels"] = max(world.allgather(kernels))
    facts = dict(job.executor.describe())
    close(job)
    return seconds, facts


def _whole(world: World, spec: JobSpec) -> float:
    """Collective. Seconds of a whole job, its opening left out."""
    from mdattn_mpi.runner.batch import run_items
    from mdattn_mpi.runner.opening import open_files, open_job

    job = open_job(spec, world)
    open_files(job)
    world.barrier()
    began = perf_counter()
    run_items(job)
    world.barrier()
    seconds = perf_counter() - began
    close(job)
    return seconds


def close(job: Job) -> None:
    """Collective. Close executors and output."""
    for group in job.groups:
        group.executor.close()
    assert job.output is not None
    job.output.close()


def _tasks(job: Job, items: Sequence[AnyItem]) -> Iterator[Task]:
    plans, rank = job.groups[0].plans, job.world.rank
    return (job.kind.task(item, plans[item.name], rank) for item in items)


def in_order(job: Job) -> list[AnyItem]:
    """All items, in the order in which the job takes them."""
    return [job.items[number] for queue in job.schedule.queues for number in queue.items]


def _room(job: Job, task: Task) -> list[HostArray]:
    executor = job.groups[0].executor
    return [executor.host_empty(shard.shape, shard.dtype) for shard in task.reads]


def _read(job: Job, files: Files) -> None:
    for task in _tasks(job, job.todo):
        files.read(task, _room(job, task))


def _write(job: Job, files: Files) -> None:
    """Write and sync every shard, of made-up contents; the whole job overwrites them."""
    import numpy as np

    from mdattn_mpi.devices.cpu.host import HostDownload
    from mdattn_mpi.runner.work import Enqueued

    for task in _tasks(job, job.todo):
        arrays = tuple(np.empty(shard.shape, shard.dtype) for shard in task.writes)
        for array in arrays:
            array.view(np.uint16)[...] = 0x3F80
        files.write(Enqueued(task, HostDownload(arrays)))


def _in_memory(job: Job, files: Files) -> Files:
    """Files of which one item of each kind is ever read, and nothing written."""
    from mdattn_mpi.runner.work import Read, Written

    shards: dict[Any, tuple[HostArray, ...]] = {}
    for task in _tasks(job, job.todo):
        if task.item.problem not in shards:
            shards[task.item.problem] = files.read(task, _room(job, task)).shards

    def write(enqueued: Enqueued) -> Written:
        enqueued.download.wait()
        return Written(enqueued.task, 0)

    return replace(
        files,
        read=lambda task, room: Read(task, shards[task.item.problem]),
        write=write,
        sync=lambda: None,
        commit=lambda finished: None,
    )


def _compute(job: Job, files: Files, items: Sequence[AnyItem]) -> None:
    """Collective. Run the loop with files that cost nothing."""
    from mdattn_mpi.lockstep import Deadlines
    from mdattn_mpi.runner.loop import Loop

    group = job.groups[0]
    loop = Loop(
        group.group,
        group.executor,
        files,
        board=job.world.board,
        deadlines=Deadlines(),
        wants_to_stop=lambda: False,
        finished=lambda task: None,
        failed=lambda item, error: None,
    )
    loop.run(_tasks(job, items))
