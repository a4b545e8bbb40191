"""Say what a file holds. For a dataset, of attention's inputs or of token ids: its items, how they
are stored, and which of them can't be done. For an output: the state of every item. For any other
HDF5, .npz, .npy, .safetensors or .pt file: the tensors that `mdattn convert` could take.

  mdattn inspect data.h5
  mdattn inspect out.h5 --check      read everything, compare checksums
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from mdattn_mpi.cli.options import add_opening_options
from mdattn_mpi.text import counted, printable, quantity, show

if TYPE_CHECKING:
    from mdattn_mpi.dataset import (
        AnyItem,
        Dataset,
        Item,
        ModelItem,
        Output,
        TensorFile,
        TokenFile,
    )
    from mdattn_mpi.dataset.foreign.tensor import ForeignTensor
    from mdattn_mpi.errors import RejectedError

T = TypeVar("T")

EPILOG = "Exit codes: 0 all is well; 1 some items are bad, failed or damaged; 2 can't be read."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("path", metavar="FILE", help="a dataset, an output, or somebody else's file")
    add("--items", default="*", metavar="PATTERN", help="only these: names or globs, with commas")
    add("--check", action="store_true", help="read all data and compare it with its checksums")
    add("--json", action="store_true", help="print JSON")
    add(
        "--layout",
        choices=("auto", "token_major", "head_major"),
        default="auto",
        help="read a dataset as if it said so",
    )
    add_opening_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Print what the file holds."""
    from mdattn_mpi.dataset.hdf5 import format_of
    from mdattn_mpi.dataset.layout import DATASET_FORMAT, OUTPUT_FORMAT

    describe = {DATASET_FORMAT: _describe_input, OUTPUT_FORMAT: _describe_output}
    facts = describe.get(format_of(arguments.path), _describe_foreign)(arguments)
    if arguments.json:
        import json

        show(json.dumps(facts, indent=1))
    else:
        show("\n".join(_lines(facts, _columns())))
    bad = facts.get("faults") or any(
        item.get("state") == "failed" or item.get("damaged") for item in facts["items"]
    )
    return 1 if bad else 0


def _describe_input(arguments: argparse.Namespace) -> dict[str, Any]:
    from mdattn_mpi.dataset.tokens import holds_tokens

    tokens = holds_tokens(arguments.path, arguments.allow or ())
    return (_describe_tokens if tokens else _describe_dataset)(arguments)


def _describe_tokens(arguments: argparse.Namespace) -> dict[str, Any]:
    from mdattn_mpi.dataset import open_tokens

    with open_tokens(
        arguments.path,
        select=arguments.items,
        allow=arguments.allow or (),
        ignore=arguments.ignore or (),
        keep_faults=True,
    ) as file:
        return {
            "path": file.path,
            "format": "mdattn-dataset",
            "bytes": file.size,
            "items": [_token_item(file, item, arguments.check) for item in file.items],
            "faults": _faults(file.faults),
        }


def _token_item(file: TokenFile, item: ModelItem, check: bool) -> dict[str, Any]:
    tensors = {
        name: {
            "shape": list(data.shape),
            "dtype": data.dtype.name,
            "storage": str(data.storage),
            "crc32": data.crc32,
        }
        for name, data in file.tensors(item).items()
    }
    checked = {"damaged": _damaged(file, item)} if check else {}
    return {
        "name": item.name,
        "tokens": item.problem.tokens,
        "documents": file.documents(item),
        "shape": file.describe(item),
        "bytes": sum(data.nbytes for data in file.tensors(item).values()),
        "tensors": tensors,
        **checked,
    }


def _damaged(file: TensorFile, item: AnyItem) -> list[str]:
    """Name the tensors whose bytes aren't those of their checksum."""
    return [
        name
        for name, data in file.tensors(item).items()
        if data.crc32 is not None and file.checksum(item, name) != data.crc32
    ]


def _faults(faults: Sequence[RejectedError]) -> list[dict[str, str]]:
    return [{"item": fault.item, "what": fault.what, "fix": fault.fix} for fault in faults]


def _describe_dataset(arguments: argparse.Namespace) -> dict[str, Any]:
    from mdattn_mpi.dataset import open_dataset

    with open_dataset(
        arguments.path,
        select=arguments.items,
        layout=arguments.layout,
        allow=arguments.allow or (),
        ignore=arguments.ignore or (),
        keep_faults=True,
    ) as dataset:
        return {
            "path": dataset.path,
            "format": "mdattn-dataset",
            "bytes": dataset.size,
            "items": [
                _dataset_item(dataset, item, arguments.check)
                for item in _watched(dataset.items, arguments)
            ],
            "faults": _faults(dataset.faults),
            "warnings": list(dataset.warnings),
        }


def _dataset_item(dataset: Dataset, item: Item, check: bool) -> dict[str, Any]:
    from mdattn_mpi.dataset.layout import TENSORS

    tensors: dict[str, Any] = {}
    for name in TENSORS:
        data = dataset.tensor(item, name)
        tensors[name] = {
            "shape": list(data.storage.shape),
            "layout": data.layout,
            "encoding": data.encoding,
            "storage": str(data.storage),
            "crc32": data.crc32,
        }
    size = sum(dataset.tensor(item, name).nbytes for name in TENSORS)
    checked = {"damaged": _damaged(dataset, item)} if check else {}
    return {
        "name": item.name,
        **_problem(item),
        "shape": dataset.describe(item),
        "bytes": size,
        "tensors": tensors,
        **checked,
    }


def _describe_output(arguments: argparse.Namespace) -> dict[str, Any]:
    from mdattn_mpi.dataset import open_output
    from mdattn_mpi.dataset.index import select_items

    with open_output(arguments.path) as output:
        chosen = select_items(output.items, arguments.items, output.path)
        items = [
            _output_item(output, item, arguments.check) for item in _watched(chosen, arguments)
        ]
        return {
            "path": output.path,
            "format": "mdattn-output",
            "lse": output.lse,
            "attributes": output.attributes,
            "items": items,
            "counts": {
                state: sum(item["state"] == state for item in items)
                for state in ("done", "failed", "todo")
            },
        }


def _output_item(output: Output, item: AnyItem, check: bool) -> dict[str, Any]:
    entry = output.ledger.entry(item)
    shape = str(item.problem)
    facts = {"name": item.name, **_problem(item), "shape": shape, "state": entry.state}
    if entry.state == "done":
        facts |= {"strategy": entry.strategy, "ranks": entry.ranks}
        if check:
            facts["damaged"] = [f"the shard of rank {rank}" for rank in output.damaged(item)]
    return facts | ({"reason": entry.reason} if entry.reason else {})


def _describe_foreign(arguments: argparse.Namespace) -> dict[str, Any]:
    from mdattn_mpi.dataset.foreign.open import open_foreign
    from mdattn_mpi.dataset.layout import natural_order, shown

    with ExitStack() as stack:
        tensors = open_foreign(arguments.path, stack, arguments.allow or ()).tensors
        return {
            "path": arguments.path,
            "format": "foreign",
            "items": [],
            "tensors": [
                {
                    "name": shown(name),
                    "shape": list(tensors[name].shape),
                    "dtype": _dtype_of(tensors[name]),
                }
                for name in sorted(tensors, key=natural_order)
            ],
        }


def _watched(items: Sequence[T], arguments: argparse.Namespace) -> Iterable[T]:
    """Show how far a check has come, on a terminal, if it takes long."""
    if not arguments.check:
        return items
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, unit="item", leave=False, delay=2, disable=None)
    return bar


def _dtype_of(tensor: ForeignTensor) -> str:
    return f"unreadable: {tensor.fault.what}" if tensor.fault else tensor.dtype.name


def _problem(item: AnyItem) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(item.problem)


def _columns() -> int:
    """The width of the terminal; without one, lines may be as long as they are."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def _lines(facts: Mapping[str, Any], columns: int) -> Iterator[str]:
    if facts["format"] == "foreign":
        yield from _wrap(
            f"{facts['path']}: not a file of mdattn; `mdattn convert` makes a dataset of it",
            columns,
        )
        yield from _table([_foreign_row(tensor) for tensor in facts["tensors"]], columns)
        return
    items = facts["items"]
    if facts["format"] == "mdattn-dataset":
        held = f"{counted(len(items), 'item')}, {quantity(facts['bytes'], 'B')}"
        yield f"{facts['path']}: dataset, {held}"
        yield from _table([_dataset_row(item) for item in items], columns)
    else:
        counts = ", ".join(f"{count} {state}" for state, count in facts["counts"].items())
        yield f"{facts['path']}: output{' with LSE' if facts['lse'] else ''}, {counts}"
        for name, value in facts["attributes"].items():
            yield from _wrap(f"{name} {printable(value)}", columns)
        yield from _table([_output_row(item) for item in items], columns)
    for item in items:
        if item.get("damaged"):
            yield from _wrap(
                f"damaged: {item['name']}: {', '.join(item['damaged'])} has other bytes than "
                "were written",
                columns,
            )
        if item.get("reason"):
            yield from _wrap(f"failed: {item['name']}: {printable(item['reason'])}", columns)
    if any("damaged" in item for item in items):
        yield from _checked(items, columns)
    for fault in facts.get("faults", ()):
        yield from _wrap(f"bad: {fault['item']}: {fault['what']}. Fix: {fault['fix']}", columns)
    for warning in facts.get("warnings", ()):
        yield from _wrap(f"warning: {warning}", columns)


def _checked(items: Sequence[Mapping[str, Any]], columns: int) -> list[str]:
    """Say what `--check` found, and what it had nothing to compare with."""
    checked = [item for item in items if "damaged" in item]
    bare = sum(
        tensor["crc32"] is None for item in checked for tensor in item.get("tensors", {}).values()
    )
    damaged = sum(bool(item["damaged"]) for item in checked)
    text = f"checked: {damaged} of {counted(len(checked), 'item')} damaged"
    text += f"; {counted(bare, 'tensor')} without a checksum" if bare else ""
    return _wrap(text, columns)


def _dataset_row(item: Mapping[str, Any]) -> dict[str, str]:
    tensors = item["tensors"].values()
    encodings = sorted({tensor.get("encoding") or tensor.get("dtype", "") for tensor in tensors})
    return {
        "item": item["name"],
        "shape": item["shape"],
        "size": quantity(item["bytes"], "B"),
        "stored": "; ".join(sorted({tensor["storage"] for tensor in tensors}))
        + (f", as {'/'.join(encodings)}" if encodings != ["float"] else ""),
    }


def _output_row(item: Mapping[str, Any]) -> dict[str, str]:
    return {
        "item": item["name"],
        "shape": item["shape"],
        "state": item["state"],
        "by": f"{item['strategy']}, {counted(item['ranks'], 'rank')}" if "ranks" in item else "",
    }


def _foreign_row(tensor: Mapping[str, Any]) -> dict[str, str]:
    shape = "×".join(map(str, tensor["shape"]))
    return {"tensor": tensor["name"], "shape": shape, "dtype": tensor["dtype"]}


def _table(rows: Sequence[Mapping[str, str]], columns: int) -> Iterator[str]:
    """One line a row; on a terminal too narrow for that, the first cell and the rest below it."""
    if not rows:
        return
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    if sum(widths) + 2 * len(widths) <= columns:
        for row in ({name: name for name in names}, *rows):
            cells = (row[name].ljust(width) for name, width in zip(names, widths, strict=True))
            yield ("  " + "  ".join(cells)).rstrip()
        return
    for row in rows:
        yield f"  {row[names[0]]}"
        facts = ", ".join(f"{name} {row[name]}" for name in names[1:] if row[name])
        yield from _wrap(facts, columns, indent="    ")


def _wrap(text: str, columns: int, indent: str = "  ") -> list[str]:
    import textwrap

    return textwrap.wrap(text, columns, initial_indent=indent, subsequent_indent=indent + "  ")
