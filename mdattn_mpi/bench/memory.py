"""``mdattn bench memory``: what K and V take on a rank, by strategy and number of ranks."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import surroundings, table

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World
    from mdattn_mpi.problem import StrategyName

DESCRIPTION = """\
Measure the most memory that the arrays of a rank take at any time while it attends on the CPU,
above what the program itself takes: all of them, and the part that doesn't depend on the query,
K and V, their buffers and their float32 panels, by attending with one query token a rank.

  mpirun -n 4 --oversubscribe mdattn bench memory -s ring
"""


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "memory",
        help="what K and V take on a rank",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-s", "--strategy", choices=("ring", "allgather", "ulysses"), default="ring")
    add("--length", type=int, default=131072, metavar="S", help="keys (default: 131072)")
    add("--kv-heads", type=int, default=1, metavar="N", help="default: 1")
    add("--head-dim", type=int, default=128, metavar="H", help="default: 128")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure under a watchdog, as a job runs."""
    from mdattn_mpi.lockstep import watch

    return watch(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.lockstep import start

    with start() as world:
        own = _peak(world, arguments.strategy, arguments)
        every = world.gather_bytes(json.dumps(own).encode())
        if world.rank == 0:
            rows = [json.loads(each) for each in every or ()]
            facts = {"ranks": str(world.size), "strategy": arguments.strategy, **surroundings()}
            print(json.dumps({"bytes": rows, **facts}) if arguments.json else _table(rows, facts))
    return 0


def _peak(world: World, strategy: StrategyName, arguments: argparse.Namespace) -> dict[str, int]:
    """Collective. Bytes of the rank's shards, and the peak of everything while it attends."""
    import tracemalloc

    import ml_dtypes
    import numpy as np

    from mdattn_mpi.backends import open_backend
    from mdattn_mpi.partition import partition_of, token_count
    from mdattn_mpi.problem import AttentionProblem

    heads, dim = arguments.kv_heads, arguments.head_dim
    problem = AttentionProblem(world.size, arguments.length, heads, heads, dim, dim)
    backend = open_backend("cpu", world, threads=1)
    plan = backend.plan(problem, strategy, lse=False)
    owners = partition_of(plan)

    def attend() -> int:
        """Attend to random shards; return their bytes."""
        random = np.random.default_rng(world.rank)

        def shard(spans: Any) -> Any:
            shape = (token_count(spans), heads, dim)
            array = np.empty(shape, ml_dtypes.bfloat16)
            for token in range(
                0, len(array), 1024
            ):  # so that making it takes no memory to speak of
                array[token : token + 1024] = random.standard_normal(
                    array[token : token + 1024].shape, np.float32
                )
            return array

        q, k, v = (shard(spans[world.rank]) for spans in (owners.query, owners.kv, owners.kv))
        running = backend.begin(plan, q, k, v)
        backend.enqueue(running)
        backend.collect(running).wait()
        return int(k.nbytes + v.nbytes)

    tracemalloc.start()  # NumPy reports its arrays
    before = tracemalloc.get_traced_memory()[0]
    shards = attend()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    world.barrier()
    backend.close()
    return {"shards": shards, "peak": peak}


def _table(rows: list[dict[str, int]], facts: dict[str, str]) -> str:
    cells = [("rank", "own K and V", "peak")] + [
        (str(rank), f"{row['shards'] / 2**20:.1f} MiB", f"{row['peak'] / 2**20:.1f} MiB")
        for rank, row in enumerate(rows)
    ]
    return "\n".join([table(cells), *(f"{name}: {value}" for name, value in facts.items())])
