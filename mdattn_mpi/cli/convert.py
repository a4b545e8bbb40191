"""``mdattn convert``: make a dataset of somebody else's file, or rewrite one of ours."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdattn_mpi.cli.options import DTYPES, add_writing_options

if TYPE_CHECKING:
    import numpy as np

    from mdattn_mpi.dataset import Item, Tensor
    from mdattn_mpi.dataset.foreign import ForeignTensor
    from mdattn_mpi.problem import Span

DESCRIPTION = """\
Make a dataset of a .npz, .safetensors or HDF5 file; rewrite a dataset of ours as contiguous,
token-major data.

  mdattn convert qkv.safetensors data.h5 --query 'l.*.q' --key 'l.*.k' --value 'l.*.v'
  mdattn convert theirs.h5 data.h5 --query '/runs/*/Q' --key '/runs/*/K' --value '/runs/*/V' \\
      --layout head_major --dtype bf16

A * stands for any text without a slash, and names the item. Without patterns, names like query,
*/query, *.q are tried. Tensors are [S, N, H] or [B, S, N, H]; [N, S, H] or [B, N, S, H] with
--layout head_major.
"""

USUAL = [
    tuple(prefix + name for name in names)
    for names in (("query", "key", "value"), ("q", "k", "v"), ("Q", "K", "V"))
    for prefix in ("", "*/", "*.", "*_", "items/*/")
]
BLOCK_BYTES = 16 << 20


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="IN", help="what to convert")
    add("path", metavar="OUT.h5", help="the dataset to write")
    for name in ("query", "key", "value"):
        add(f"--{name}", metavar="PATH", help=f"name of the {name} in IN, with * for the item")
    add(
        "--layout",
        choices=("token_major", "head_major"),
        default="token_major",
        help="order of tokens and heads in IN (default token_major)",
    )
    add("--dtype", choices=DTYPES, help="round to this; needed when IN isn't 16-bit")
    add("--allow", action="append", default=[], metavar="DIR", help="folder that links may lead to")
    add_writing_options(parser)
    return parser


@dataclass(frozen=True)
class Source:
    """An item to be, and how to read tokens of its tensors, token-major."""

    item: Item
    read: Callable[[Tensor, Span], np.ndarray[Any, Any]]


def main(arguments: argparse.Namespace) -> int:
    """Write the dataset."""
    from tqdm import tqdm

    from mdattn_mpi.dataset import create_dataset
    from mdattn_mpi.dataset.making import shapes

    with ExitStack() as stack:
        sources = find_sources(arguments, stack)
        tensors = [
            (source, tensor, shape)
            for source in sources
            for tensor, shape in shapes(source.item.problem).items()
        ]
        total = sum(2 * shape[0] * shape[1] * shape[2] for *_, shape in tensors)
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)
        )
        items = [source.item for source in sources]
        dataset = stack.enter_context(
            create_dataset(arguments.path, items, overwrite=arguments.overwrite)
        )
        for source, tensor, shape in tensors:
            for block in rounded_blocks(source, tensor, shape, arguments.source):
                dataset.append(source.item, tensor, block)
                bar.update(block.nbytes)
    print(f"{arguments.path}: {len(sources)} items, {total / 1e6:.1f} MB")
    for source in sources[:10]:
        print(f"  {source.item.name}: {source.item.problem}")
    if len(sources) > 10:
        print(f"  … and {len(sources) - 10} more: mdattn inspect {arguments.path}")
    return 0


def rounded_blocks(
    source: Source, tensor: Tensor, shape: tuple[int, int, int], file: str
) -> Iterator[np.ndarray[Any, Any]]:
    """Read a tensor by blocks of tokens and round it to the item's dtype.

    Raises
    ------
    RejectedError
        A finite number is too large for FP16.

    """
    import numpy as np

    from mdattn_mpi.dataset.dtypes import NUMPY
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.problem import Span

    tokens, heads, dim = shape
    dtype = NUMPY[source.item.problem.dtype]
    step = max(1, BLOCK_BYTES // (2 * heads * dim))
    for start in range(0, tokens, step):
        block = source.read(tensor, Span(start, min(start + step, tokens)))
        with np.errstate(over="ignore"):
            rounded = block.astype(dtype)
        if block.dtype != dtype and np.any(np.isinf(rounded) & np.isfinite(block)):
            raise RejectedError(
                f"{tensor} holds {np.max(np.abs(block)):.6g}, too large for {dtype.name}",
                fix="use --dtype bf16",
                file=file,
                item=source.item.name,
            )
        yield rounded


def find_sources(arguments: argparse.Namespace, stack: ExitStack) -> list[Source]:
    """Find the items in the file, ours or not."""
    from mdattn_mpi.dataset import open_dataset
    from mdattn_mpi.dataset.foreign import open_foreign
    from mdattn_mpi.dataset.hdf5 import format_of
    from mdattn_mpi.dataset.layout import DATASET_FORMAT

    given = (arguments.query, arguments.key, arguments.value)
    if not any(given) and format_of(arguments.source) == DATASET_FORMAT:
        dataset = stack.enter_context(open_dataset(arguments.source, allow=arguments.allow))
        return [
            Source(
                _rounded(item, DTYPES.get(arguments.dtype)),
                lambda tensor, span, item=item: dataset.read(item, tensor, (span,)),  # type: ignore[misc]
            )
            for item in dataset.items
        ]
    tensors = open_foreign(arguments.source, stack, arguments.allow)
    names = match_names(tensors, given, arguments.source)
    sources: list[Source] = []
    for name, triple in names.items():
        sources += _sources(name, [tensors[path] for path in triple], arguments, len(sources))
    return sources


def _rounded(item: Item, dtype: Any) -> Item:
    return replace(item, problem=replace(item.problem, dtype=dtype)) if dtype else item


def match_names(
    tensors: Mapping[str, ForeignTensor], given: tuple[str | None, ...], file: str
) -> dict[str, tuple[str, ...]]:
    """Give every item the names of its query, key and value.

    Raises
    ------
    RejectedError
        No query matches, or one has no key or value.

    """
    from mdattn_mpi.dataset.layout import natural_order, shown
    from mdattn_mpi.errors import RejectedError

    if any(given) and not all(given):
        raise RejectedError("not all patterns are given", fix="give --query, --key and --value")
    patterns = [tuple(str(p).lstrip("/") for p in given)] if any(given) else USUAL
    stem = re.sub(r"[^\w.-]", "_", Path(file).stem) or "item"
    for triple in patterns:
        found = {}
        for name in sorted(tensors, key=natural_order):
            pieces = _pieces(name, triple[0])
            if pieces is not None:
                found[".".join(pieces) or stem] = tuple(_fill(p, pieces) for p in triple)
        missing = [n for names in found.values() for n in names if n not in tensors]
        if found and not missing:
            return found
        if any(given) and missing:
            raise RejectedError(
                f"holds no tensor {shown(missing[0])!r}", fix="correct the patterns", file=file
            )
    listed = ", ".join(f"{shown(n)} {list(tensors[n].shape)}" for n in list(tensors)[:8])
    raise RejectedError(
        f"no tensor matches; it holds {listed or 'no tensors of floats'}"
        + (" …" if len(tensors) > 8 else ""),
        fix="name them with --query, --key and --value",
        file=file,
    )


def _pieces(name: str, pattern: str) -> list[str] | None:
    """What the stars of `pattern` stand for in `name`; None when it doesn't match."""
    expression = "([^/]+)".join(re.escape(part) for part in pattern.split("*"))
    match = re.fullmatch(expression, name)
    return list(match.groups()) if match else None


def _fill(pattern: str, pieces: list[str]) -> str:
    parts = pattern.split("*")
    return "".join(a + b for a, b in zip(parts, [*pieces, ""], strict=False))


def _sources(
    name: str, tensors: list[ForeignTensor], arguments: argparse.Namespace, first: int
) -> list[Source]:
    """Make one item of three tensors, or one for each entry of their batch dim."""
    from mdattn_mpi.dataset import Item
    from mdattn_mpi.dataset.layout import TENSORS, batch_item_name, item_name_fault
    from mdattn_mpi.errors import RejectedError

    def reject(what: str, fix: str) -> RejectedError:
        return RejectedError(what, fix=fix, file=arguments.source, item=name)

    shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(TENSORS, tensors, strict=True))
    for tensor in tensors:
        if tensor.fault is not None:
            raise tensor.fault
    if {len(tensor.shape) for tensor in tensors} not in ({3}, {4}):
        raise reject(f"shapes are {shapes}", "use [S, N, H], or [B, S, N, H] for B items")
    batches = {tensor.shape[:-3] for tensor in tensors}
    if len(batches) > 1:
        raise reject(f"batch dims disagree: {shapes}", "give all three the same")
    if item_name_fault(name):
        raise reject(f"its name {item_name_fault(name)}", "use a pattern that gives another name")
    problem = _problem(tensors, arguments, reject, shapes)
    (batch,) = batches
    if not batch:
        return [Source(Item(name, first, problem), _reader(tensors, None, arguments.layout))]
    return [
        Source(
            Item(batch_item_name(name, entry), first + entry, problem),
            _reader(tensors, entry, arguments.layout),
        )
        for entry in range(batch[0])
    ]


def _problem(
    tensors: list[ForeignTensor],
    arguments: argparse.Namespace,
    reject: Callable[[str, str], Exception],
    shapes: str,
) -> Any:
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.problem import AttentionProblem

    swap = arguments.layout == "head_major"
    (q, n, h), (s, m, g), (t, o, v) = (
        (shape[1], shape[0], shape[2]) if swap else shape
        for shape in (tensor.shape[-3:] for tensor in tensors)
    )
    found = {tensor.dtype.newbyteorder("=").name for tensor in tensors}
    dtype: Any = DTYPES[arguments.dtype] if arguments.dtype else found.pop()
    if found and not arguments.dtype:
        raise reject(f"dtypes disagree: {dtype}, {', '.join(found)}", "choose --dtype bf16 or fp16")
    if dtype not in DTYPES.values():
        raise reject(f"its dtype is {dtype}", "choose --dtype bf16 or fp16 to round to")
    if (s, m) != (t, o) or h != g:
        raise reject(
            f"shapes disagree: {shapes}", "see --layout; key and value share tokens and heads"
        )
    try:
        return AttentionProblem(
            q,
            s,
            n,
            m,
            h,
            v,
            dtype,
            arguments.causal,
            arguments.scale,
        )
    except RejectedError as error:
        raise reject(f"{error.what} (shapes {shapes})", f"{error.fix}; see --layout") from None


def _reader(
    tensors: list[ForeignTensor], entry: int | None, layout: str
) -> Callable[[Tensor, Span], np.ndarray[Any, Any]]:
    from mdattn_mpi.dataset.layout import TENSORS

    def read(tensor: Tensor, span: Span) -> np.ndarray[Any, Any]:
        source = tensors[TENSORS.index(tensor)]
        everything = slice(0, None)
        index = (span.slice, everything, everything)
        if layout == "head_major":
            index = (everything, span.slice, everything)
        if entry is None:
            block = source.fetch(index)
        else:
            block = source.fetch((slice(entry, entry + 1), *index))[0]
        return block.swapaxes(0, 1) if layout == "head_major" else block

    return read
