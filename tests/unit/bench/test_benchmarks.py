"""Every benchmark can be called as the command calls it."""

from __future__ import annotations

import argparse
import inspect
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace

import pytest

from mdattn_mpi import bench
from mdattn_mpi.cli.bench import main

MODULES = [
    import_module(module.name) for module in iter_modules(bench.__path__, bench.__name__ + ".")
]
BENCHMARKS = [module for module in MODULES if hasattr(module, "add_options")]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.__name__)
def test_a_benchmark_is_called_with_what_it_takes(benchmark: object) -> None:
    """`main` takes the arguments; without it, `measure` takes the world and the arguments."""
    if hasattr(benchmark, "main"):
        inspect.signature(benchmark.main).bind("arguments")
    else:
        inspect.signature(benchmark.measure).bind("world", "arguments")  # type: ignore[attr-defined]


def test_the_command_calls_main_where_there_is_one() -> None:
    """A helper of the benchmark's own may be named `measure` too."""
    benchmark = SimpleNamespace(main=lambda arguments: 3, measure=None)
    assert main(argparse.Namespace(benchmark=benchmark)) == 3
