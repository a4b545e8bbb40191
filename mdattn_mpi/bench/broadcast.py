"""``mdattn bench broadcast``: how an engine of a GiB reaches all ranks, against MPI's own Bcast."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World

DESCRIPTION = """\
Give random bytes of rank 0 to all ranks: by the call that shares engines, which makes the memory
that it receives into, and by MPI's Bcast, once into memory that is new as well and once into memory
that was written before. Alternating; medians of the slowest rank.

  mpirun -n 4 mdattn bench broadcast --mib 1024
"""


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "broadcast",
        help="how fast an engine reaches all ranks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=1024, metavar="N", help="default: 1024")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="default: 5")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure under the watchdog."""
    from mdattn_mpi.lockstep import watch

    return watch(lambda: _measure(arguments))


def _measure(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.bench.measure import alternate, report, surroundings
    from mdattn_mpi.lockstep import start

    with start() as world:
        seconds = alternate(world, _kinds(world, arguments.mib << 20), arguments.rounds)
        rates = {name: arguments.mib / 1024 / took for name, took in seconds.items()}
        facts = {
            "ranks": world.size,
            "mib": arguments.mib,
            **{f"{name}_gib_per_s": round(rate, 3) for name, rate in rates.items()},
            "ours_over_mpi_new_memory": round(rates["ours"] / rates["mpi_new_memory"], 3),
            "ours_over_mpi_used_memory": round(rates["ours"] / rates["mpi_used_memory"], 3),
            **surroundings("mpi4py"),
        }
        report(facts, world, as_json=arguments.json)
    return 0


def _kinds(world: World, size: int) -> dict[str, Callable[[], Any]]:
    import numpy as np

    data = np.random.default_rng(0).bytes(size) if world.rank == 0 else None
    used = np.ones(size, np.uint8)

    def bcast(memory: Any) -> None:
        world.control.Bcast(memory if data is None else data, 0)

    return {
        "ours": lambda: world.bcast_large(data),
        "mpi_new_memory": lambda: bcast(np.empty(size, np.uint8)),
        "mpi_used_memory": lambda: bcast(used),
    }
