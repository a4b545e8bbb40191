"""What K and V take on a rank.

Measure the most memory that the arrays of a rank take at any time while it attends on the CPU,
above what the program itself takes: all of them, and the part that doesn't depend on the query,
K and V, their buffers and their float32 panels, by attending with one query token a rank.

  mpirun -n 4 --oversubscribe mdattn bench memory -s ring
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from mdattn_mpi.bench.measure import Side, report
from mdattn_mpi.bench.options import add_shapes, one_problem
from mdattn_mpi.problem import FLAT_STRATEGIES

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare strategy and shape."""
    parser.add_argument("-s", "--strategy", choices=FLAT_STRATEGIES, default="ring")
    add_shapes(parser, lengths=(131072,), q_heads=1, kv_heads=1)


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Measure; rank 0 prints."""
    every = world.allgather(_peak(world, arguments))
    if world.rank == 0:
        rows = [("rank", "own K and V", "peak")] + [
            (str(rank), f"{row['shards'] / 2**20:.1f} MiB", f"{row['peak'] / 2**20:.1f} MiB")
            for rank, row in enumerate(every)
        ]
        facts = {"ranks": str(world.size), "strategy": arguments.strategy}
        report({"bytes": every}, rows, facts, as_json=arguments.json)


def _peak(world: World, arguments: argparse.Namespace) -> dict[str, int]:
    """Collective. Bytes of the rank's shards, and the peak of everything while it attends."""
    import tracemalloc

    problem = replace(one_problem(arguments), q_tokens=world.size)
    side = Side.open(world, arguments.strategy, 1, problem)

    def attend() -> int:
        """Attend to random shards; return their bytes."""
        shards = side.random_shards()
        side.attend(shards)
        return sum(shard.nbytes for shard in shards[1:])

    tracemalloc.start()  # NumPy reports its arrays
    before = tracemalloc.get_traced_memory()[0]
    shards = attend()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    world.barrier()
    side.backend.close()
    return {"shards": shards, "peak": peak}
