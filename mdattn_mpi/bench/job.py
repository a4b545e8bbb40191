"""``mdattn bench job``: the whole job against the slowest of its parts alone."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import surroundings

if TYPE_CHECKING:
    from mdattn_mpi.backends import HostArray
    from mdattn_mpi.dataset import AnyItem
    from mdattn_mpi.lockstep import World
    from mdattn_mpi.runner.job import Job
    from mdattn_mpi.runner.jobspec import JobSpec
    from mdattn_mpi.runner.loop import Files
    from mdattn_mpi.runner.work import Enqueued, Task, Written

DESCRIPTION = """\
Time a whole batch job, and the same job with all but one of its parts left out: reading every shard
from page cache, computing from memory, writing every shard and syncing it. A job can't be faster
than the slowest of them; wall / slowest says how much is lost.

  mpirun -n 2 mdattn bench job -b cuda --folder /local/scratch
"""


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "job",
        help="the whole job against the slowest of its parts",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-b", "--backend", default="auto", metavar="NAME", help="default: auto")
    add("-s", "--strategy", default="auto", metavar="NAME", help="default: auto")
    add("--items", type=int, default=16, metavar="N", help="how many (default: 16)")
    add("--length", type=int, default=65536, metavar="S", help="tokens (default: 65536)")
    add("--q-heads", type=int, default=32, metavar="N", help="default: 32")
    add("--kv-heads", type=int, default=8, metavar="N", help="default: 8")
    add("--head-dim", type=int, default=128, metavar="H", help="default: 128")
    add("--causal", action="store_true", help="token i sees keys 0 … i")
    add("--folder", metavar="DIR", help="where the files go (default: a temporary folder)")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure under a watchdog, as a job runs."""
    from mdattn_mpi.lockstep import watch

    return watch(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.lockstep import start, together
    from mdattn_mpi.runner.jobspec import JobSpec

    with start() as world:
        base = arguments.folder or tempfile.gettempdir()
        folder = Path(base) / f"mdattn-bench-{world.job:016x}"
        try:
            if world.rank == 0:
                folder.mkdir(parents=True)
            together(
                world,
                "dataset",
                lambda: _make_dataset(folder, arguments) if world.rank == 0 else None,
            )
            spec = JobSpec(
                str(folder / "data.h5"),
                str(folder / "out.h5"),
                backend=arguments.backend,
                strategy=arguments.strategy,
                nonfinite="pass",
            )
            seconds = _measure(world, spec)
        finally:
            if world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        if world.rank == 0:
            print(_report(seconds, arguments))
    return 0


def _make_dataset(folder: Path, arguments: argparse.Namespace) -> None:
    """Write items of random numbers; one block of them again and again, or it would take longer
    than the benchmark.
    """
    import numpy as np

    from mdattn_mpi.dataset import NUMPY, TENSORS, Item, create_dataset
    from mdattn_mpi.dataset.making import shapes
    from mdattn_mpi.problem import AttentionProblem

    dims = (arguments.head_dim, arguments.head_dim)
    problem = AttentionProblem(
        *(arguments.length,) * 2,
        arguments.q_heads,
        arguments.kv_heads,
        *dims,
        causal="upper_left" if arguments.causal else "none",
    )
    items = [Item(f"item{number}", number, problem) for number in range(arguments.items)]
    block = np.random.default_rng().standard_normal(1 << 24, np.float32).astype(NUMPY["bfloat16"])
    with create_dataset(folder / "data.h5", items) as dataset:
        for item in items:
            for tensor in TENSORS:
                left = int(np.prod(shapes(problem)[tensor]))
                while left:
                    dataset.append(item, tensor, block[: min(left, block.size)])
                    left -= min(left, block.size)


def _measure(world: World, spec: JobSpec) -> dict[str, float]:
    """Collective. Seconds of the whole job and of each part alone, the slowest rank's."""
    from mdattn_mpi.runner.batch import files_of, run_items
    from mdattn_mpi.runner.opening import open_files, open_job

    job = open_job(spec, world)
    open_files(job)
    assert job.output is not None
    files = files_of(job, job.output)
    parts: dict[str, Callable[[], None]] = {
        "warm-up": lambda: _compute(job, _in_memory(job, files), job.todo[:2]),
        "reading": lambda: _read(job, files),
        "computing": lambda: _compute(job, _in_memory(job, files), job.todo),
        "writing": lambda: _write(job, files),
        "whole job": lambda: run_items(job),
    }
    seconds = {}
    for name, part in parts.items():
        world.board.enter(name)
        world.barrier()
        began = perf_counter()
        part()
        world.barrier()
        seconds[name] = perf_counter() - began
    for group in job.groups:
        group.executor.close()
    return seconds


def _tasks(job: Job, items: Sequence[AnyItem]) -> Iterator[Task]:
    plans, rank = job.groups[0].plans, job.world.rank
    return (job.kind.task(item, plans[item.name], rank) for item in items)


def _room(job: Job, task: Task) -> list[HostArray]:
    executor = job.groups[0].executor
    return [executor.host_empty(shard.shape, shard.dtype) for shard in task.reads]


def _read(job: Job, files: Files) -> None:
    for task in _tasks(job, job.todo):
        files.read(task, _room(job, task))


def _write(job: Job, files: Files) -> None:
    """Write and sync every shard, of made-up contents; the whole job overwrites them."""
    import numpy as np

    from mdattn_mpi.runner.work import Enqueued

    class Made:
        """A download that is there."""

        def __init__(self, arrays: Sequence[HostArray]) -> None:
            self.arrays = arrays

        def wait(self) -> Sequence[HostArray]:
            """Return the arrays."""
            return self.arrays

    for task in _tasks(job, job.todo):
        arrays = [np.empty(shard.shape, shard.dtype) for shard in task.writes]
        for array in arrays:
            array.view(np.uint16)[...] = 0x3F80
        files.write(Enqueued(task, Made(arrays)))


def _in_memory(job: Job, files: Files) -> Files:
    """Files of which only the first item is ever read, and nothing written."""
    from mdattn_mpi.runner.work import Read, Written

    first = next(_tasks(job, job.todo[:1]))
    shards = files.read(first, _room(job, first)).shards

    def write(enqueued: Enqueued) -> Written:
        enqueued.download.wait()
        return Written(enqueued.task, 0)

    return replace(
        files,
        read=lambda task, room: Read(task, shards),
        write=write,
        commit=lambda task, checksums: None,
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


def _report(seconds: dict[str, float], arguments: argparse.Namespace) -> str:
    parts = {name: seconds[name] for name in ("reading", "computing", "writing")}
    slowest = max(parts, key=parts.__getitem__)
    ratio = seconds["whole job"] / parts[slowest]
    if arguments.json:
        found = {"seconds": seconds, "slowest": slowest, "ratio": ratio, **surroundings()}
        return json.dumps(found)
    mask = ", causal" if arguments.causal else ""
    lines = [
        f"{arguments.items} items of {arguments.length} tokens, {arguments.q_heads}/"
        f"{arguments.kv_heads} heads of {arguments.head_dim}, BF16{mask}",
        *(f"{name + ' alone':<18}{time:9.3f} s" for name, time in parts.items()),
        f"{'whole job':<18}{seconds['whole job']:9.3f} s",
        f"whole job / {slowest} alone: {ratio:.3f}",
    ]
    return "\n".join([*lines, *(f"{key}: {value}" for key, value in surroundings().items())])
