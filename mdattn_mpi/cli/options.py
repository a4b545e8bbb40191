"""What several commands share: options, and text that is safe for a terminal."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from mdattn_mpi.problem import DTYPES as DTYPES


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
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def printable(value: object) -> str:
    """`value` as text without control characters, which could drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def add_ignore(add: Callable[..., object]) -> None:
    """Declare --ignore, for every command that opens a dataset."""
    add(
        "--ignore",
        action="extend",
        type=_names,
        metavar="NAME",
        help="attribute or dataset of items that mdattn doesn't know and that doesn't matter",
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
