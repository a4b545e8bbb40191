"""Reading a rank's shard, against plain preadv.

Time `Dataset.read` of one rank's shard of Q, K and V against `os.preadv` of as many bytes, from the
page cache, into arrays that are there already. One span a tensor, and two (a causal ring's
zigzag). Alternating; medians.

  mdattn bench read --length 65536 --ranks 4
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import alternate, report, versions
from mdattn_mpi.bench.options import add_folder, add_rounds
from mdattn_mpi.problem import AttentionProblem, DTypeName, Span

if TYPE_CHECKING:
    from mdattn_mpi.dataset import Dataset, Item
    from mdattn_mpi.dataset.layout import Encoding, Layout

KINDS: dict[str, tuple[DTypeName, Encoding, Layout]] = {
    "bf16 as float": ("bfloat16", "float", "token_major"),
    "bf16 as uint16": ("bfloat16", "uint16", "token_major"),
    "bf16 as opaque": ("bfloat16", "opaque", "token_major"),
    "fp16": ("float16", "float", "token_major"),
    "bf16, head-major": ("bfloat16", "float", "head_major"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare shard, rounds and folder."""
    add = parser.add_argument
    add("--length", type=int, default=65536, metavar="S", help="tokens (default: 65536)")
    add("--ranks", type=int, default=4, metavar="P", help="of which one reads (default: 4)")
    add_rounds(parser, 51)
    add_folder(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure all kinds."""
    found = list(_measure(arguments))
    rows = [["stored", "spans", "MB", "read GB/s", "preadv GB/s", "ratio"]]
    for row in found:
        speeds = [f"{row[name]:.2f}" for name in ("read", "preadv", "ratio")]
        rows.append([row["stored"], str(row["spans"]), f"{row['bytes'] / 1e6:.0f}", *speeds])
    report({"rows": found}, rows, versions("h5py", "numpy"), as_json=arguments.json)
    return 0


def _measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from mdattn_mpi.bench.items import make_dataset
    from mdattn_mpi.dataset import open_dataset
    from mdattn_mpi.partition import split, zigzag

    length, ranks = arguments.length, arguments.ranks
    shards = ((split(length, ranks)[1 % ranks],), zigzag(length, ranks)[0])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = os.path.join(folder, "data.h5")
        for kind, (dtype, encoding, layout) in KINDS.items():
            problem = AttentionProblem(length, length, 8, 2, 128, 128, dtype)
            make_dataset(path, [problem], encoding=encoding, layout=layout, overwrite=True)
            with open_dataset(path) as dataset:
                for spans in shards:
                    yield {"stored": kind, "spans": len(spans)} | compare(
                        dataset, dataset.items[0], spans, arguments.rounds
                    )


def compare(dataset: Dataset, item: Item, spans: Sequence[Span], rounds: int) -> dict[str, float]:
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

        took = alternate({"read": read, "preadv": preadv}, rounds)
    return {
        "bytes": nbytes,
        "read": nbytes / took["read"] / 1e9,
        "preadv": nbytes / took["preadv"] / 1e9,
        "ratio": took["preadv"] / took["read"],
    }
