"""``mdattn bench ranks``: P ranks of one thread against one rank of P threads, on the same item."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from mdattn_mpi.bench.measure import surroundings, table
from mdattn_mpi.errors import RejectedError

if TYPE_CHECKING:
    from mdattn_mpi.backends import Backend
    from mdattn_mpi.lockstep import Group, World
    from mdattn_mpi.problem import Plan

DESCRIPTION = """\
Time one item on P ranks of one thread each, and on rank 0 alone with P threads, in turn, on the
CPU. A speed above 1 means that the ranks together are faster.

  mpirun -n 2 --bind-to none mdattn bench ranks
"""

NAP = 0.002  # seconds; ranks that have nothing to do must leave their core to the one that has


class Team(NamedTuple):
    """A group with its backend and shards, ready to attend."""

    backend: Backend
    plan: Plan
    shards: Sequence[Any]

    def attend(self) -> Any:
        """Collective. Attend once."""
        running = self.backend.begin(self.plan, *self.shards)
        self.backend.enqueue(running)
        return self.backend.collect(running).wait()


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "ranks",
        help="P ranks of one thread against one rank of P threads",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-s", "--strategies", default="ring,allgather", metavar="S,S", help="default: both")
    add("--length", type=int, default=8192, metavar="S", help="tokens (default: 8192)")
    add("--q-heads", type=int, default=8, metavar="N", help="default: 8")
    add("--kv-heads", type=int, default=8, metavar="N", help="default: 8")
    add("--head-dim", type=int, default=128, metavar="H", help="default: 128")
    add("--causal", action="store_true", help="token i sees keys 0 … i")
    add("--rounds", type=int, default=5, metavar="R", help="runs of each side (default: 5)")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure under a watchdog, as a job runs."""
    from mdattn_mpi.lockstep import watch

    return watch(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.lockstep import start

    with start() as world:
        _refuse_bound_cores(world)
        alone = world.split(world.rank)
        rows = {
            name: _compare(world, alone, name, arguments)
            for name in arguments.strategies.split(",")
        }
        if world.rank == 0:
            facts = {"ranks": str(world.size), **surroundings("numpy", "mpi4py")}
            print(json.dumps({"speed": rows, **facts}) if arguments.json else _table(rows, facts))
    return 0


def _refuse_bound_cores(world: World) -> None:
    """Collective. One rank must be able to use the cores of all."""
    import os

    cores = len(os.sched_getaffinity(0))
    if cores < world.size:
        error = RejectedError(
            f"{world.size} ranks, but a rank may use {cores} cores", fix="mpirun --bind-to none"
        )
        error.agreed = True  # every rank of a node finds the same
        raise error


def _compare(
    world: World, alone: Group, strategy: str, arguments: argparse.Namespace
) -> dict[str, float]:
    """Collective. Medians of both sides in seconds; the slowest rank counts."""
    together = _team(world, strategy, 1, arguments)
    single = _team(alone, "ring", world.size, arguments)
    times: list[tuple[float, float]] = []
    for _ in range(arguments.rounds + 1):  # the first round doesn't count
        ours = _timed(world, together.attend)
        theirs = _timed(world, single.attend if world.rank == 0 else lambda: None)
        times.append((ours, theirs))
    together.backend.close()
    single.backend.close()
    ranks, threads = (median(side) for side in zip(*times[1:], strict=True))
    return {"ranks": ranks, "threads": threads, "speed": threads / ranks}


def _team(group: Group, strategy: Any, threads: int, arguments: argparse.Namespace) -> Team:
    """Collective. The same random item whatever the group; a rank makes its own shard of it."""
    import ml_dtypes
    import numpy as np

    from mdattn_mpi.backends import open_backend
    from mdattn_mpi.partition import partition_of
    from mdattn_mpi.problem import AttentionProblem

    length, dim = arguments.length, arguments.head_dim
    heads = (arguments.q_heads, arguments.kv_heads)
    mask: Any = "upper_left" if arguments.causal else "none"
    problem = AttentionProblem(length, length, *heads, dim, dim, causal=mask)
    backend = open_backend("cpu", group, threads=threads)
    plan = backend.plan(problem, strategy, lse=False)
    owners = partition_of(plan)

    def shard(number: int, count: int, spans: Any) -> Any:
        random = np.random.default_rng(number)
        whole = random.standard_normal((length, count, dim), np.float32)
        whole = whole.astype(ml_dtypes.bfloat16)
        return np.concatenate([whole[span.slice] for span in spans])

    q, kv = owners.query[group.rank], owners.kv[group.rank]
    shards = (shard(0, heads[0], q), shard(1, heads[1], kv), shard(2, heads[1], kv))
    return Team(backend, plan, shards)


def _timed(world: World, work: Callable[[], Any]) -> float:
    """Collective. Seconds until the last rank is done; those who wait don't spin."""
    _meet(world)
    start = time.perf_counter()
    work()
    _meet(world)
    return time.perf_counter() - start


def _meet(world: World) -> None:
    world.board.wait()
    barrier = world.control.Ibarrier()
    while not barrier.Test():
        time.sleep(NAP)


def _table(rows: dict[str, dict[str, float]], facts: dict[str, str]) -> str:
    cells = [("strategy", f"{facts['ranks']} ranks", f"{facts['ranks']} threads", "speed")] + [
        (name, f"{row['ranks']:.3f} s", f"{row['threads']:.3f} s", f"{row['speed']:.2f}")
        for name, row in rows.items()
    ]
    return "\n".join([table(cells), *(f"{name}: {value}" for name, value in facts.items())])
