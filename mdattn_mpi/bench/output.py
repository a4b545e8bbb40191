"""How fast the output of a job is made, before its first item.

Make outputs of so many items: all of one length, and of 5000 lengths, in turn. The rate is by
processor time, HDF5's own included, so that a busy disk doesn't count; medians. Or, with --data,
make one output for a dataset that has just been opened, as a job does.

  mdattn bench output --items 5000,100000
  mdattn bench output --data data.h5
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import process_time
from typing import TYPE_CHECKING

from mdattn_mpi.bench.measure import report, versions
from mdattn_mpi.bench.options import add_folder, add_rounds, numbers
from mdattn_mpi.problem import AttentionProblem

if TYPE_CHECKING:
    from mdattn_mpi.dataset import Item

ITEMS = (5000, 100_000)
LENGTH = 16  # tokens of an item, of one head of `HEAD_DIM`; of the shortest, where lengths differ
LENGTHS = (1, 5000)
HEAD_DIM = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare how many items."""
    add = parser.add_argument
    add("--items", type=numbers, default=ITEMS, metavar="N,N", help="default: 5000,100000")
    add("--lengths", type=numbers, default=LENGTHS, metavar="L,L", help="default: 1,5000")
    add("--data", metavar="DATA.h5", help="the items of this dataset, once")
    add_rounds(parser)
    add_folder(parser)


def main(arguments: argparse.Namespace) -> int:
    """Make outputs; print the rates."""
    found = list(_rates(arguments))
    rows = [list(found[0]), *([str(value) for value in row.values()] for row in found)]
    report({"figures": found}, rows, versions("numpy", "h5py"), as_json=arguments.json)
    return 0


def _rates(arguments: argparse.Namespace) -> Iterator[dict[str, int]]:
    """One row for each count of items and of lengths."""
    with tempfile.TemporaryDirectory(prefix="mdattn-bench-", dir=arguments.folder) as folder:
        path = Path(folder) / "out.h5"
        _seconds(path, _items(9, 1))  # what is imported and prepared once
        if arguments.data:
            yield _of_dataset(arguments.data, path)
            return
        for count in arguments.items:
            took: dict[int, list[float]] = {lengths: [] for lengths in arguments.lengths}
            for _ in range(arguments.rounds):
                for lengths, seconds in took.items():
                    seconds.append(_seconds(path, _items(count, lengths)))
            for lengths, seconds in took.items():
                rate = round(count / median(seconds))
                yield {"items": count, "lengths": lengths, "items / CPU second": rate}


def _of_dataset(data: str, path: Path) -> dict[str, int]:
    """One row: all that the opening has made is in memory."""
    from mdattn_mpi.dataset import open_dataset

    with open_dataset(data) as dataset:
        count, lengths = len(dataset.items), len({item.problem for item in dataset.items})
        rate = round(count / _seconds(path, dataset.items))
    return {"items": count, "problems": lengths, "items / CPU second": rate}


def _items(count: int, lengths: int) -> list[Item]:
    """Items of so many lengths; no two share a problem, as in a dataset."""
    from mdattn_mpi.dataset import Item

    def problem(number: int) -> AttentionProblem:
        tokens = LENGTH + number % lengths
        return AttentionProblem(tokens, tokens, 1, 1, HEAD_DIM, HEAD_DIM)

    return [Item(f"item{number}", number, problem(number)) for number in range(count)]


def _seconds(path: Path, items: Sequence[Item]) -> float:
    """Seconds of this process for one output."""
    from mdattn_mpi.dataset import create_output

    began = process_time()
    create_output(path, items, ranks=2)
    took = process_time() - began
    os.unlink(path)
    return took
