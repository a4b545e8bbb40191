"""``mdattn bench``: figures, side by side with somebody else's, and how they came about.

Each module of `mdattn_mpi.bench` that has an `add_parser` is one benchmark.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mdattn_mpi import bench

DESCRIPTION = """\
Measure. Every benchmark alternates between the two sides that it compares, takes medians, uses
random data (zeros run faster), and prints hardware, versions and commit with its figures.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the benchmarks."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure speed, memory, and what each guarantee costs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    for module in iter_modules(bench.__path__, "mdattn_mpi.bench."):
        benchmark = import_module(module.name)
        if hasattr(benchmark, "add_parser"):
            benchmark.add_parser(benchmarks).set_defaults(measure=benchmark.main)
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark that was asked for."""
    code: int = arguments.measure(arguments)
    return code
