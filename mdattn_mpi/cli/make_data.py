"""Write a dataset of normally distributed Q, K and V, or of token ids.

  mdattn make-data data.h5 --items 4 --length 8192 --q-heads 8 --kv-heads 2
  mdattn make-data tokens.h5 --items 200 --lengths 1000:200000 \\
      --vocabulary 32000

The second writes token ids for a model; many items are short and few are long. The same arguments
and seed give the same bytes. A tensor is drawn from a generator of its own, so the first items stay
the same when there are more of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mdattn_mpi.cli.options import DTYPES, add_writing_options
from mdattn_mpi.text import counted, quantity, show

if TYPE_CHECKING:
    import numpy as np

    from mdattn_mpi.dataset import Item

BLOCK = 1 << 22  # numbers that are drawn at once


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("path", metavar="OUT.h5", help="the dataset to write")
    add("--items", type=int, default=4, metavar="N", help="how many (default 4)")
    add("--length", type=int, default=8192, metavar="S", help="tokens of an item (default 8192)")
    add("--lengths", type=_range, metavar="A:B", help="instead, each item's drawn from A to B")
    add("--kv-length", type=int, metavar="S", help="tokens of key and value (default: the query's)")
    add("--q-heads", type=int, default=8, metavar="N", help="query heads (default 8)")
    add("--kv-heads", type=int, default=2, metavar="N", help="kv heads (default 2)")
    add("--head-dim", type=int, default=128, metavar="H", help="of query and key (default 128)")
    add("--v-head-dim", type=int, metavar="H", help="of value (default: the same)")
    add("--sinks", action="store_true", help="draw a sink for each query head")
    add("--vocabulary", type=int, metavar="V", help="instead of Q, K, V: token ids below V")
    add("--documents", type=int, metavar="N", help="pack so many, of long-tailed lengths")
    add("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    add(
        "--encoding",
        choices=("float", "uint16", "opaque"),
        default="float",
        help="of BF16 in HDF5 (default float: it describes itself)",
    )
    add(
        "--layout",
        choices=("token_major", "head_major"),
        default="token_major",
        help=argparse.SUPPRESS,
    )
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add("--quiet", action="store_true", help="print nothing")
    add_writing_options(parser)


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a range; write A:B with 1 <= A <= B")
    return int(first), int(last)


def main(arguments: argparse.Namespace) -> int:
    """Write the dataset."""
    from tqdm import tqdm

    from mdattn_mpi.dataset import DatasetWriter
    from mdattn_mpi.dataset.making import shapes

    if arguments.vocabulary is not None:
        return _make_tokens(arguments)

    items = plan_items(arguments)
    sizes = [
        (item, tensor, shape[0] * shape[1] * shape[2])
        for item in items
        for tensor, shape in shapes(item.problem).items()
    ]
    total = 2 * sum(size for *_, size in sizes)
    with (
        tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            disable=arguments.quiet or None,
            leave=False,
        ) as bar,
        DatasetWriter(
            arguments.path,
            items,
            encoding=arguments.encoding,
            layout=arguments.layout,
            overwrite=arguments.overwrite,
        ) as dataset,
    ):
        for number, (item, tensor, size) in enumerate(sizes):
            for block in random_blocks(arguments.seed, number, size, item.problem.dtype):
                dataset.append(item, tensor, block)
                bar.update(block.nbytes)
        for item in items if arguments.sinks else ():
            dataset.append(item, "sinks", random_sinks(arguments.seed, item))
    if not arguments.quiet:
        held = f"{counted(len(items), 'item')}, {quantity(total, 'B')}, seed {arguments.seed}"
        show(f"{arguments.path}: {held}")
    return 0


def _make_tokens(arguments: argparse.Namespace) -> int:
    """Write token ids; of lengths from A to B many are short and few long: their logs are even."""
    import numpy as np

    from mdattn_mpi.dataset import DatasetWriter
    from mdattn_mpi.errors import RejectedError

    if arguments.items < 1 or arguments.seed < 0 or arguments.vocabulary < 1:
        raise RejectedError(
            f"--items is {arguments.items}, --seed {arguments.seed}, "
            f"--vocabulary {arguments.vocabulary}",
            fix="use at least one item and id, and a seed that is not negative",
        )
    first, last = np.log(arguments.lengths or (arguments.length, arguments.length))
    tokens = 0
    with DatasetWriter(arguments.path, overwrite=arguments.overwrite) as writer:
        for number in range(arguments.items):
            draw = np.random.default_rng([arguments.seed, number])
            length = round(np.exp(draw.uniform(first, last)))
            ids = draw.integers(0, arguments.vocabulary, length, np.int32)
            writer.add_tokens(f"item{number}", ids)
            tokens += length
    if not arguments.quiet:
        told = f"{counted(arguments.items, 'item')}, {counted(tokens, 'token')}"
        show(f"{arguments.path}: {told}, seed {arguments.seed}")
    return 0


def plan_items(arguments: argparse.Namespace) -> list[Item]:
    """Describe the items that the arguments ask for."""
    import numpy as np

    from mdattn_mpi.dataset import Item
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.mask import UNBOUNDED
    from mdattn_mpi.problem import AttentionProblem

    if arguments.items < 1 or arguments.seed < 0:
        raise RejectedError(
            f"--items is {arguments.items}, --seed {arguments.seed}",
            fix="use at least one item, and a seed that is not negative",
        )
    first, last = arguments.lengths or (arguments.length, arguments.length)
    draw = np.random.default_rng(arguments.seed)
    items = []
    for index in range(arguments.items):
        length = int(draw.integers(first, last, endpoint=True))
        problem = AttentionProblem(
            q_tokens=length,
            kv_tokens=length if arguments.kv_length is None else arguments.kv_length,
            q_heads=arguments.q_heads,
            kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
            v_head_dim=arguments.v_head_dim or arguments.head_dim,
            dtype=DTYPES[arguments.dtype],
            causal=arguments.causal or "none",
            scale=arguments.scale,
            window=tuple(arguments.window or UNBOUNDED),
            softcap=arguments.softcap or 0.0,
            sinks=arguments.sinks,
            segments=random_documents(arguments, length, index),
        )
        items.append(Item(f"item{index}", index, problem))
    return items


def random_documents(arguments: argparse.Namespace, length: int, index: int) -> tuple[int, ...]:
    """Draw the first tokens of an item's documents; their lengths are Pareto's."""
    import numpy as np

    from mdattn_mpi.errors import RejectedError

    count = arguments.documents
    if count is None:
        return ()
    if not 1 <= count <= length:
        raise RejectedError(f"--documents is {count}", fix=f"use 1 to {length}, the tokens")
    shares = np.random.default_rng([arguments.seed, index]).pareto(1.2, count) + 0.1
    ends = np.cumsum(1 + np.floor((length - count) * shares / shares.sum()).astype(int))
    return (0, *map(int, ends[:-1]))


def random_sinks(seed: int, item: Item) -> np.ndarray[Any, Any]:
    """Draw a sink for each query head; from a generator of its own."""
    import numpy as np

    draw = np.random.default_rng([seed, item.index, item.problem.q_heads])
    return draw.standard_normal(item.problem.q_heads, np.float32)


def random_blocks(seed: int, tensor: int, size: int, dtype: str) -> Iterator[np.ndarray[Any, Any]]:
    """Draw `size` numbers of the standard normal distribution, by blocks."""
    import numpy as np

    from mdattn_mpi.dataset.dtypes import NUMPY

    draw = np.random.Generator(np.random.SFC64([seed, tensor]))
    for start in range(0, size, BLOCK):
        numbers = draw.standard_normal(min(BLOCK, size - start), np.float32)
        yield numbers.astype(NUMPY[dtype])
