"""``mdattn bench``: figures, side by side with somebody else's, and how they came about.

Each module of `mdattn_mpi.bench` that has a `main` is one benchmark. Its docstring is its help; its
`add_options` declares what else it takes besides ``--json``.
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
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    for module in iter_modules(bench.__path__, "mdattn_mpi.bench."):
        benchmark = import_module(module.name)
        if hasattr(benchmark, "add_options"):
            _add_benchmark(benchmarks, module.name.rpartition(".")[2], benchmark)
    return parser


def _add_benchmark(benchmarks: Any, name: str, benchmark: Any) -> None:
    about = benchmark.__doc__ or ""
    first = about.partition("\n")[0].rstrip(".")
    parser = benchmarks.add_parser(
        name,
        help=first[:1].lower() + first[1:],
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(measure=benchmark.main)


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark that was asked for."""
    code: int = arguments.measure(arguments)
    return code
