"""The command line: one module a command, each with `add_parser` and `main`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from importlib import import_module
from importlib.util import find_spec

from mdattn_mpi.errors import MdattnError
from mdattn_mpi.lockstep import launcher

COMMANDS = (
    "run",
    "verify",
    "make_data",
    "convert",
    "inspect",
    "status",
    "bench",
    "build",
    "shard",
    "submit",
    "doctor",
)

Main = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="mdattn",
        description="Exact attention over very long sequences on many ranks, in batch, under MPI.",
        epilog="Exit codes: 0 done, 1 some items failed, 2 rejected, 3 ranks disagreed, "
        "4 device or engine error, 75 interrupted: run the same command again to resume.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        if find_spec(f"mdattn_mpi.cli.{name}"):
            command = import_module(f"mdattn_mpi.cli.{name}")
            command.add_parser(commands).set_defaults(main=command.main)
    with redirect_stderr(None) if launcher().rank > 0 else nullcontext():  # said once is enough
        arguments = parser.parse_args(argv)
    command_main: Main = arguments.main
    try:
        return command_main(arguments)
    except MdattnError as error:
        print(f"mdattn: error: {error}", file=sys.stderr)
        return error.exit_code
