"""Many ranks of one thread, against one rank of as many threads.

Time one item on P ranks of one thread each, and on rank 0 alone with P threads, in turn, on the
CPU. A speed above 1 means that the ranks together are faster.

  mpirun -n 2 --bind-to none mdattn bench ranks
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from mdattn_mpi.bench.measure import Side, alternate, report, versions
from mdattn_mpi.bench.options import add_rounds, add_shapes, one_problem
from mdattn_mpi.errors import RejectedError

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import Group, World
    from mdattn_mpi.problem import AttentionProblem

NAP = 0.002  # seconds; ranks that have nothing to do must leave their core to the one that has


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare strategies, shape and rounds."""
    parser.add_argument(
        "-s", "--strategies", default="ring,allgather", metavar="S,S", help="default: both"
    )
    add_shapes(parser, lengths=(8192,))
    add_rounds(parser)


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Measure; rank 0 prints."""
    _refuse_bound_cores(world)
    alone = world.split(world.rank)
    speed = {
        name: _compare(world, alone, name, one_problem(arguments), arguments.rounds)
        for name in arguments.strategies.split(",")
    }
    if world.rank == 0:
        rows = [("strategy", f"{world.size} ranks", f"{world.size} threads", "speed")] + [
            (name, f"{row['ranks']:.3f} s", f"{row['threads']:.3f} s", f"{row['speed']:.2f}")
            for name, row in speed.items()
        ]
        facts = {"ranks": str(world.size), **versions("numpy", "mpi4py")}
        report({"speed": speed}, rows, facts, as_json=arguments.json)


def _refuse_bound_cores(world: World) -> None:
    """Collective. One rank must be able to use the cores of all."""
    cores = len(os.sched_getaffinity(0))
    if cores < world.size:
        error = RejectedError(
            f"{world.size} ranks, but a rank may use {cores} cores", fix="mpirun --bind-to none"
        )
        error.agreed = True  # every rank of a node finds the same
        raise error


def _compare(
    world: World, alone: Group, strategy: str, problem: AttentionProblem, rounds: int
) -> dict[str, float]:
    """Collective. Medians of both sides in seconds, until the last rank is done."""
    together = Side.open(world, strategy, 1, problem)
    single = Side.open(alone, "ring", world.size, problem)
    part, whole = together.random_shards(), single.random_shards()
    meet = partial(_meet, world)

    def threads() -> None:
        if world.rank == 0:
            single.attend(whole)
        meet()

    def ranks() -> None:
        together.attend(part)
        meet()

    took = alternate({"ranks": ranks, "threads": threads}, rounds, before=meet, world=world)
    together.backend.close()
    single.backend.close()
    return {**took, "speed": took["threads"] / took["ranks"]}


def _meet(world: World) -> None:
    """Collective. A barrier in which those who wait don't spin."""
    world.board.wait()
    barrier = world.control.Ibarrier()
    while not barrier.Test():
        time.sleep(NAP)
