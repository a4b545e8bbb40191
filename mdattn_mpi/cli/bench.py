"""Measure. Every benchmark alternates between the two sides that it compares, takes medians, uses
random data (zeros run faster), and prints hardware, versions and commit with its figures.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pkgutil import iter_modules

from mdattn_mpi import bench
from mdattn_mpi.bench.measure import on_all_ranks
from mdattn_mpi.cli.options import add_command


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare every module of `mdattn_mpi.bench` that takes options, each a benchmark."""
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    for module in iter_modules(bench.__path__, "mdattn_mpi.bench."):
        benchmark = import_module(module.name)
        if hasattr(benchmark, "add_options"):
            about = (benchmark.__doc__ or "").partition("\n")[0].rstrip(".")
            about = about[:1].lower() + about[1:]
            one = add_command(benchmarks, module.name.rpartition(".")[2], benchmark, about)
            one.add_argument("--json", action="store_true", help="print JSON")
            one.set_defaults(benchmark=benchmark)


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark that was asked for: its `main`, else its `measure` on all ranks."""
    benchmark = arguments.benchmark
    if hasattr(benchmark, "main"):
        code: int = benchmark.main(arguments)
        return code
    return on_all_ranks(lambda world: benchmark.measure(world, arguments))
