"""Options that several benchmarks share, and the problems that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from typing import get_args

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import UNBOUNDED
from mdattn_mpi.problem import DTYPES, AttentionProblem, Causal


def add_shapes(
    parser: argparse.ArgumentParser,
    *,
    lengths: Sequence[int],
    q_heads: int = 8,
    kv_heads: int = 8,
    head_dims: Sequence[int] = (128,),
    causal: str = "none",
    dtype: str = "bf16",
) -> None:
    """Declare what `problems` reads, with these defaults."""
    add = parser.add_argument
    add(
        "--lengths",
        type=numbers,
        default=lengths,
        metavar="S,S",
        help=f"tokens (default: {_join(lengths)})",
    )
    add("--q-heads", type=int, default=q_heads, metavar="N", help=f"default: {q_heads}")
    add("--kv-heads", type=int, default=kv_heads, metavar="N", help=f"default: {kv_heads}")
    add(
        "--head-dims",
        type=numbers,
        default=head_dims,
        metavar="H,H",
        help=f"default: {_join(head_dims)}",
    )
    add(
        "--causal",
        choices=(*get_args(Causal), "both"),
        nargs="?",
        const="upper_left",
        default=causal,
        help=f"mask; both is none and upper_left (default: {causal}; alone: upper_left)",
    )
    add("--dtype", choices=(*DTYPES, "both"), default=dtype, help=f"default: {dtype}")


def add_window(parser: argparse.ArgumentParser) -> None:
    """Declare ``--window``, which `problems` reads where a benchmark has it."""
    parser.add_argument(
        "--window",
        nargs=2,
        type=int,
        default=UNBOUNDED,
        metavar=("BEFORE", "AFTER"),
        help="keys seen before and after the diagonal; -1: all (default)",
    )


def problems(arguments: argparse.Namespace) -> Iterator[AttentionProblem]:
    """All combinations of lengths, head dims, dtypes and causal masks."""
    window = tuple(getattr(arguments, "window", UNBOUNDED))
    dtypes = list(DTYPES.values()) if arguments.dtype == "both" else [DTYPES[arguments.dtype]]
    both: tuple[Causal, ...] = ("none", "upper_left")
    masks = both if arguments.causal == "both" else (arguments.causal,)
    heads = (arguments.q_heads, arguments.kv_heads)
    for length, dim, dtype, causal in product(
        arguments.lengths, arguments.head_dims, dtypes, masks
    ):
        yield AttentionProblem(*(length, length), *heads, *(dim, dim), dtype, causal, window=window)


def one_problem(arguments: argparse.Namespace) -> AttentionProblem:
    """Return the problem that the arguments describe.

    Raises
    ------
    RejectedError
        They describe several.

    """
    first, *others = problems(arguments)
    if others:
        raise RejectedError(
            f"{1 + len(others)} shapes", fix="give one length, head dim, mask and dtype"
        )
    return first


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Declare ``-b``."""
    parser.add_argument(
        "-b", "--backend", choices=("cpu", "cuda"), default="cpu", help="default: cpu"
    )


def add_rounds(parser: argparse.ArgumentParser, default: int = 5) -> None:
    """Declare ``--rounds``."""
    parser.add_argument(
        "--rounds",
        type=int,
        default=default,
        metavar="R",
        help=f"runs of each side (default: {default})",
    )


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Declare ``--folder``."""
    parser.add_argument(
        "--folder", metavar="DIR", help="where the files go (default: a temporary folder)"
    )


def numbers(text: str) -> tuple[int, ...]:
    """Parse ``2048,8192``; an argparse type."""
    return tuple(int(part) for part in text.split(","))


def _join(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
