"""``mdattn bench read``: reading a rank's shard, against plain `os.preadv` of the same bytes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdattn_mpi.dataset import Dataset, Item
    from mdattn_mpi.problem import Span

DESCRIPTION = """\
Time `Dataset.read` of one rank's shard of Q, K and V against `os.preadv` of as many bytes, from the
page cache, into arrays that are there already. One span a tensor, and two (a causal ring's
zigzag). Alternating; medians.

  mdattn bench read --length 65536 --ranks 4
"""

KINDS = {  # as the arguments of `mdattn make-data`
    "bf16 as float": ("bf16", "float", "token_major"),
    "bf16 as uint16": ("bf16", "uint16", "token_major"),
    "bf16 as opaque": ("bf16", "opaque", "token_major"),
    "fp16": ("fp16", "float", "token_major"),
    "bf16, head-major": ("bf16", "float", "head_major"),
}


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "read",
        help="reading a shard against plain preadv",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--length", type=int, default=65536, metavar="S", help="tokens (default 65536)")
    add("--ranks", type=int, default=4, metavar="P", help="of which one reads (default 4)")
    add("--runs", type=int, default=51, metavar="N", help="of each kind (default 51)")
    add("--folder", metavar="DIR", help="where to put the datasets (default: the temporary one)")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure all kinds."""
    from mdattn_mpi.bench.measure import surroundings, table

    rows = list(_measure(arguments))
    facts = surroundings("h5py", "numpy")
    if arguments.json:
        print(json.dumps({"rows": rows, **facts}))
        return 0
    cells = [["stored", "spans", "MB", "read GB/s", "preadv GB/s", "ratio"]]
    for row in rows:
        speeds = [f"{row[name]:.2f}" for name in ("read", "preadv", "ratio")]
        cells.append([row["stored"], str(row["spans"]), f"{row['bytes'] / 1e6:.0f}", *speeds])
    print(table(cells))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    return 0


def _measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from mdattn_mpi.cli import main as mdattn
    from mdattn_mpi.dataset import open_dataset
    from mdattn_mpi.partition import split, zigzag

    shards = (
        (split(arguments.length, arguments.ranks)[1 % arguments.ranks],),
        zigzag(arguments.length, arguments.ranks)[0],
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = os.path.join(folder, "data.h5")
        for kind, (dtype, encoding, layout) in KINDS.items():
            options = ["--dtype", dtype, "--encoding", encoding, "--layout", layout]
            size = ["--items", "1", "--length", str(arguments.length)]
            mdattn(["make-data", path, *size, *options, "--overwrite", "--quiet"])
            with open_dataset(path) as dataset:
                for spans in shards:
                    yield {"stored": kind, "spans": len(spans)} | compare(
                        dataset, dataset.items[0], spans, arguments.runs
                    )


def compare(dataset: Dataset, item: Item, spans: Sequence[Span], runs: int) -> dict[str, float]:
    """Bytes of a shard, GB/s of both ways, and their ratio."""
    import numpy as np

    from mdattn_mpi.dataset.layout import TENSORS

    arrays = {name: dataset.read(item, name, spans) for name in TENSORS}
    nbytes = sum(array.nbytes for array in arrays.values())

    def read() -> None:
        for name, array in arrays.items():
            dataset.read(item, name, spans, out=array)

    with ExitStack() as stack:
        fd = os.open(dataset.path, os.O_RDONLY)
        stack.callback(os.close, fd)
        plan = []
        for name, array in arrays.items():
            data = dataset.tensor(item, name)
            raw, done = array.reshape(-1).view(np.uint8).data, 0
            for span in spans:  # of as many bytes, one after the other, whatever the layout
                size = len(span) * data.token_bytes
                start = (data.offset or 0) + span.start * data.token_bytes
                plan.append((raw[done : done + size], start))
                done += size

        def preadv() -> None:
            for buffer, offset in plan:
                os.preadv(fd, [buffer], offset)

        ours, theirs = alternate(read, preadv, runs)
    return {
        "bytes": nbytes,
        "read": nbytes / ours / 1e9,
        "preadv": nbytes / theirs / 1e9,
        "ratio": theirs / ours,
    }


def alternate(
    first: Callable[[], None], second: Callable[[], None], runs: int
) -> tuple[float, float]:
    """Median seconds of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for action, taken in zip((first, second), seconds, strict=True):
            start = perf_counter()
            action()
            taken.append(perf_counter() - start)
    return median(seconds[0]), median(seconds[1])
