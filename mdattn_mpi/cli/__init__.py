"""The command line: one module a command, each with `add_parser` and `main`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
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

PATIENCE = 1.0  # seconds in which rank 0 has said what is wrong

Main = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="mdattn",
        description="Exact attention over very long sequences on many ranks, in batch, under MPI.",
        epilog="Exit codes: 0 done, 1 some items failed, 2 rejected, 3 ranks disagreed, "
        "4 device or engine error or a bug, 75 interrupted: run the same command again to resume.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        if find_spec(f"mdattn_mpi.cli.{name}"):
            command = import_module(f"mdattn_mpi.cli.{name}")
            command.add_parser(commands).set_defaults(main=command.main)
    arguments = _parse(parser, argv)
    command_main: Main = arguments.main
    try:
        code = command_main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has seen enough, as in `mdattn inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MdattnError as error:
        print(f"mdattn: error: {error}", file=sys.stderr)
        return error.exit_code


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse on every rank; let rank 0 alone complain, and before a launcher kills it."""
    if launcher().rank <= 0:
        return parser.parse_args(argv)
    try:
        with redirect_stderr(None), redirect_stdout(None):
            return parser.parse_args(argv)
    except SystemExit:
        time.sleep(PATIENCE)
        raise
