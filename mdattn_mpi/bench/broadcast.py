"""How fast an engine reaches all ranks.

Give random bytes of rank 0 to all ranks: by the call that shares engines, which makes the memory
that it receives into, and by MPI's Bcast, once into memory that is new as well and once into memory
that was written before. Alternating; medians of the slowest rank.

  mpirun -n 4 mdattn bench broadcast --mib 1024
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import alternate, report, versions
from mdattn_mpi.bench.options import add_rounds

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare size and rounds."""
    parser.add_argument("--mib", type=int, default=1024, metavar="N", help="default: 1024")
    add_rounds(parser)


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Measure; rank 0 prints."""
    kinds = _kinds(world, arguments.mib << 20)
    seconds = alternate(kinds, arguments.rounds, before=world.control.Barrier, world=world)
    rates = {name: arguments.mib / 1024 / took for name, took in seconds.items()}
    figures = {
        "ranks": world.size,
        "mib": arguments.mib,
        **{f"{name}_gib_per_s": round(rate, 3) for name, rate in rates.items()},
        "ours_over_mpi_new_memory": round(rates["ours"] / rates["mpi_new_memory"], 3),
        "ours_over_mpi_used_memory": round(rates["ours"] / rates["mpi_used_memory"], 3),
    }
    if world.rank == 0:
        rows = [(name, str(value)) for name, value in figures.items()]
        report(figures, rows, versions("mpi4py"), as_json=arguments.json)


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
