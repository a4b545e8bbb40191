"""The command line: one module a command, each with `add_options` and `main`.

Only the module of the command that is named is imported.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module

from mdattn_mpi import __version__
from mdattn_mpi.cli.options import HelpFormatter, add_command
from mdattn_mpi.errors import MdattnError
from mdattn_mpi.lockstep import launcher
from mdattn_mpi.text import stop_showing, wrapped

COMMANDS = {  # and what `mdattn --help` says of them
    "run": "compute attention over every item of a dataset",
    "plan": "say what a job will take: time, memory, what it waits for",
    "verify": "compare an output with float64 attention",
    "make-data": "write a synthetic dataset",
    "convert": "make a dataset of other files: tensors, or texts for a model",
    "inspect": "say what a file holds, and what is finished",
    "status": "say how a job is doing, from another shell",
    "report": "write a page about a job, and a trace of it",
    "bench": "measure speed, memory, and what each guarantee costs",
    "build": "build a TensorRT engine ahead of a job",
    "shard": "share an ONNX model by tokens",
    "submit": "submit a job to Slurm",
    "doctor": "check this machine, or all nodes of a job",
}

PATIENCE = 1.0  # seconds in which rank 0 has said what is wrong

Main = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; return its exit code."""
    if "_ARGCOMPLETE" in os.environ:
        complete(os.environ.get("COMP_LINE", ""))
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(argv[:1])
    arguments = _parse(parser, argv or ["--help"])
    if isinstance(sys.stdout, io.TextIOWrapper):  # the bytes of a path may not be text
        sys.stdout.reconfigure(errors=sys.stderr.errors or "backslashreplace")
    command_main: Main = arguments.main
    try:
        code = command_main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has seen enough, as in `mdattn verify … | head`
        stop_showing()
        return 0
    except KeyboardInterrupt:
        print("mdattn: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except MdattnError as error:
        print(wrapped(f"mdattn: error: {error}"), file=sys.stderr)
        return error.exit_code


def complete(line: str) -> None:
    """Answer a shell that asks how `line` may go on, and exit.

    Source: argcomplete, whose ``register-python-argcomplete mdattn`` tells the shell to ask.
    """
    with suppress(ImportError):  # the shell asks for another environment, which has it
        from argcomplete import autocomplete

        autocomplete(make_parser(line.split()[1:2]))


def make_parser(wanted: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Declare all commands, and the arguments of those that are `wanted`.

    Of the others nothing is imported.
    """
    parser = argparse.ArgumentParser(
        prog="mdattn",
        formatter_class=HelpFormatter,
        description="Exact attention over very long sequences on many ranks, in batch, under MPI.",
        epilog="Exit codes: 0 done, 1 some items failed, 2 rejected, 3 ranks disagreed, "
        "4 device or engine error or a bug, 75 interrupted: run the same command again to resume.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        prog=parser.prog, title="commands", metavar="COMMAND", required=True
    )
    for name, about in COMMANDS.items():
        if name in wanted:
            command = import_module(f"mdattn_mpi.cli.{name.replace('-', '_')}")
            its_own = add_command(commands, name, command, about)
            its_own.set_defaults(main=command.main, parser=its_own)
        else:
            commands.add_parser(name, help=about, formatter_class=HelpFormatter)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse on every rank; let rank 0 alone complain, and before a launcher kills it."""
    if launcher().rank <= 0:
        return _parse_all(parser, argv)
    try:
        with redirect_stderr(None), redirect_stdout(None):
            return _parse_all(parser, argv)
    except SystemExit:
        time.sleep(PATIENCE)
        raise


def _parse_all(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """As ``parse_args``, but what isn't known is complained of with the usage of the command."""
    arguments, unknown = parser.parse_known_args(argv)
    its_own = vars(arguments).pop("parser")  # what is left are the command's options
    if unknown:
        its_own.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments
