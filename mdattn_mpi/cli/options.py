"""What commands share: how they are declared, options, and text that is safe for a terminal."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from contextlib import suppress
from types import ModuleType
from typing import Any

from mdattn_mpi.problem import DTYPES as DTYPES


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs, but leaves those that are indented, examples, as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=columns() - 2)  # left out, argparse imports shutil, always

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(part, width, break_on_hyphens=False)
            for part in paragraphs
        )


def columns() -> int:
    """How wide the terminal is, as `shutil.get_terminal_size` tells it."""
    with suppress(KeyError, ValueError):
        if (given := int(os.environ["COLUMNS"])) > 0:
            return given
    with suppress(AttributeError, ValueError, OSError):
        if sys.__stdout__ and (found := os.get_terminal_size(sys.__stdout__.fileno()).columns):
            return found
    return 80


def add_command(commands: Any, name: str, module: ModuleType, about: str) -> Any:
    """Declare a command: its module's docstring is its help, its `add_options` adds the rest."""
    parser = commands.add_parser(
        name,
        help=about,
        description=module.__doc__,
        epilog=getattr(module, "EPILOG", None),
        formatter_class=HelpFormatter,
    )
    module.add_options(parser)
    return parser


def whole_number(text: str) -> int:
    """Take a number of nodes, ranks or GPUs."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number from 1 on")
    return int(text)


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Declare what every command that writes a dataset takes: mask, scale, overwriting."""
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument(
        "--causal",
        action="store_const",
        const="upper_left",
        help="token i sees keys 0 … i",
    )
    masks.add_argument(
        "--causal-lower-right",
        dest="causal",
        action="store_const",
        const="lower_right",
        help="the last token sees all keys, the one before it one less, …",
    )
    parser.add_argument("--scale", type=float, metavar="X", help="of the scores (default 1/√H)")
    parser.add_argument(
        "--window",
        nargs=2,
        type=int,
        metavar=("BEFORE", "AFTER"),
        help="keys seen before and after the diagonal; -1: all",
    )
    parser.add_argument("--softcap", type=float, metavar="C", help="scores become C·tanh(s/C)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def add_opening_options(parser: argparse._ActionsContainer) -> None:
    """Declare what every command that opens somebody's file takes: --allow, --ignore."""
    parser.add_argument(
        "--allow", action="append", metavar="DIR", help="folder that HDF5 links may lead to"
    )
    parser.add_argument(
        "--ignore",
        action="extend",
        type=_names,
        metavar="NAME",
        help="attribute or dataset of items that mdattn doesn't know and that doesn't matter",
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
