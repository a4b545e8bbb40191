"""What a dataset holds: every selected item is looked at, nothing is read yet."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import TypeVar

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.hdf5 import File, Node
from mdattn_mpi.dataset.layout import (
    BESIDE,
    DATASET_FORMAT,
    ITEMS,
    LAYOUTS,
    MAX_ITEMS,
    TENSORS,
    VERSION,
    AnyItem,
    Tensor,
    batch_item_name,
    item_name_fault,
    natural_order,
    problem_of,
    shown,
)
from mdattn_mpi.dataset.tensors import TensorData
from mdattn_mpi.dataset.unknown import misplaced_in, refuse_unknown, unknown_in
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import MAX_SEGMENTS, UNBOUNDED, Span
from mdattn_mpi.problem import AttentionProblem

T = TypeVar("T", bound=AnyItem)


@dataclass(frozen=True)
class IndexedItem:
    """An item that can be done, and where its tensors lie."""

    name: str
    problem: AttentionProblem
    tensors: dict[str, TensorData]


def check_format(root: Node, wanted: str) -> None:
    """Compare the root attributes ``format`` and ``version`` with what is wanted.

    Raises
    ------
    RejectedError
        They differ.

    """
    reject = root.file.reject
    found, version = root.attribute("format"), root.attribute("version")
    if found is None:
        raise reject(
            f"has no attribute format, so it isn't an {wanted}",
            "make one from it with `mdattn convert`",
        )
    if found != wanted:
        raise reject(
            f"format is {shown(str(found))!r}, not {wanted!r}",
            "name the other file: datasets and outputs are two formats",
        )
    if version != VERSION:
        raise reject(f"version is {version}, not {VERSION}", "use the mdattn that wrote it")


def patterns_of(select: str) -> list[str]:
    """Split names and globs at the commas."""
    patterns = [pattern.strip() for pattern in select.split(",") if pattern.strip()]
    if not patterns:
        raise RejectedError("no item is selected", fix="name items, or * for all")
    return patterns


def select_items(items: Sequence[T], select: str, file: str) -> list[T]:
    """Choose the items whose names match.

    Raises
    ------
    RejectedError
        A pattern matches none.

    """
    names = {item.name for item in items}
    chosen = chosen_names(names, patterns_of(select), file)
    return [item for item in items if item.name in chosen]


def chosen_names(names: Collection[str], patterns: Sequence[str], file: str) -> set[str]:
    """Choose by exact name; by glob where a pattern is nobody's name. ``*`` always means all.

    Raises
    ------
    RejectedError
        A pattern matches none.

    """
    chosen: set[str] = set()
    for pattern in patterns:
        exact = pattern in names and pattern != "*"
        matching = {pattern} if exact else {n for n in names if fnmatchcase(n, pattern)}
        if not matching:
            raise _no_match(pattern, sorted(names, key=natural_order), file)
        chosen |= matching
    return chosen


def _no_match(pattern: str, names: Sequence[str], file: str) -> RejectedError:
    from difflib import get_close_matches

    close = get_close_matches(pattern, [shown(name) for name in names[:10_000]], 3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see `mdattn inspect`"
    return RejectedError(f"no item matches {pattern!r}", fix=hint, file=file)


def find_items(
    file: File, layout: str, ignore: Collection[str] = ()
) -> tuple[list[IndexedItem], list[RejectedError]]:
    """Look at the selected items; return the good ones and what is wrong with others.

    Raises
    ------
    RejectedError
        The file isn't a dataset, or a pattern matches nothing.

    """
    root, patterns = file.root, patterns_of(file.select)
    check_format(root, DATASET_FORMAT)
    group = root.child(ITEMS)
    if group is None or not group.is_group:
        raise file.reject(f"has no group /{ITEMS}", "see docs/file-format.md")
    refuse_unknown((*misplaced_in(root), *misplaced_in(group)), ignore, file.path)
    default = layout if layout != "auto" else str(root.attribute("layout") or "token_major")
    names = sorted(group.names(), key=natural_order)
    found: list[tuple[str, IndexedItem]] = []
    faults: dict[str, RejectedError] = {}
    for name in names:
        if not any(may_match(name, pattern) for pattern in patterns):
            continue
        try:
            found += [(name, item) for item in _items(group, name, layout, default, ignore)]
        except RejectedError as fault:
            fault.item = shown(name)
            faults[name] = fault
        if len(found) > MAX_ITEMS:
            raise file.reject(f"has more than {MAX_ITEMS} items", "select some, or split the file")
    if not names:
        raise file.reject(f"/{ITEMS} is empty", "put at least one item into it")
    items = [item for _, item in found]
    _check_unique(file, items)
    chosen = chosen_names({*names, *(item.name for item in items)}, patterns, file.path)
    return (
        [item for name, item in found if name in chosen or item.name in chosen],
        [fault for name, fault in faults.items() if name in chosen],
    )


def may_match(name: str, pattern: str) -> bool:
    """Whether `pattern` may match the item, or an entry of its batch dim."""
    literal = pattern.split("*")[0].split("?")[0].split("[")[0]
    batch = batch_item_name(name, 0)[:-1]
    return fnmatchcase(name, pattern) or batch.startswith(literal) or literal.startswith(batch)


def _check_unique(file: File, found: Sequence[IndexedItem]) -> None:
    taken: set[str] = set()
    for item in found:
        if item.name in taken:
            raise file.reject(
                f"two items are called {item.name!r}: one of them is an entry of a batch dim",
                "rename one of them",
            )
        taken.add(item.name)


def first_of(faults: Sequence[RejectedError]) -> RejectedError:
    """Make one error of several."""
    first = faults[0]
    more = f" (and {len(faults) - 1} more items are bad)" if len(faults) > 1 else ""
    return RejectedError(
        first.what + more,
        fix=f"{first.fix}; `mdattn inspect` lists all, --items leaves some out",
        file=first.file,
        item=first.item,
    )


def item_group(group: Node, name: str, tensors: str) -> Node:
    """Return the group of one item.

    Raises
    ------
    RejectedError
        Its name can't be one, or it isn't a group, of `tensors`.

    """
    reject = group.file.reject
    fault = item_name_fault(name)
    if fault:
        raise reject(f"its name {fault}", "rename it")
    item = group.child(name)
    if item is None or not item.is_group:
        raise reject("isn't a group", f"store it as /{ITEMS}/{name}/{tensors}")
    return item


def _items(
    group: Node, name: str, layout: str, default: str, ignore: Collection[str]
) -> list[IndexedItem]:
    """Look at one item, or at all entries of its batch dim."""
    item = item_group(group, name, "query, key and value")
    reject = group.file.reject
    if "input_ids" in item.names() and "query" not in item.names():
        raise reject("holds token ids, no query, key and value", "name a model: --model DIR")
    refuse_unknown(unknown_in(item, (*TENSORS, *BESIDE)), ignore, group.file.path)
    chosen = str(item.attribute("layout") or default) if layout == "auto" else layout
    if chosen not in LAYOUTS:
        raise reject(f"layout is {shown(chosen)!r}", f"use {' or '.join(LAYOUTS)}")
    beside = [name for name in BESIDE if item.child(name) is not None]
    crc32s = item.numbers("crc32", len(TENSORS) + len(beside)) or (None,) * len(TENSORS)
    three: dict[str, TensorData] = {
        tensor: _tensor(item, tensor, chosen, crc32)
        for tensor, crc32 in zip(TENSORS, crc32s, strict=False)
    }
    others = {
        name: _beside(item, name, crc32)
        for name, crc32 in zip_longest(beside, crc32s[len(TENSORS) :])
    }
    tensors = three | others
    problem = _problem(item, tensors)
    query = tensors["query"]
    if len(query.storage.shape) == 3:
        return [IndexedItem(name, problem, tensors)]
    if query.storage.shape[0] > MAX_ITEMS:
        raise reject(f"its batch dim has more than {MAX_ITEMS} entries", "split the file")
    fault = item_name_fault(batch_item_name(name, query.storage.shape[0] - 1))
    if fault:
        raise reject(f"the name of its last entry {fault}", "give the item a shorter name")
    return [
        IndexedItem(
            batch_item_name(name, position),
            problem,
            {name: replace(data, position=position) for name, data in three.items()} | others,
        )
        for position in range(query.storage.shape[0])
    ]


def _tensor(item: Node, tensor: Tensor, layout: str, crc32: int | None) -> TensorData:
    reject = item.file.reject
    node = item.child(tensor)
    if node is None or not node.is_dataset:
        raise reject(f"has no dataset {tensor!r}", f"write its {tensor}")
    storage = node.storage()
    if len(storage.shape) not in (3, 4):
        raise reject(
            f"{tensor} has shape {list(storage.shape)}",
            "use [S, N, H], or [B, S, N, H] for B items",
        )
    stored = storage.stored
    if isinstance(stored, str):
        raise reject(
            f"{tensor} holds {stored}; only BF16 and FP16 can be read",
            _fix_of(stored, item.file.path),
        )
    if not stored.little_endian:
        raise reject(f"{tensor} is big-endian", f"rewrite it: {_convert(item.file.path)}")
    first, second, head_dim = storage.shape[-3:]
    shape = (first, second, head_dim) if layout == "token_major" else (second, first, head_dim)
    return TensorData(
        shape,
        NUMPY[stored.dtype],
        node,
        storage,
        layout="token_major" if layout == "token_major" else "head_major",
        crc32=crc32,
    )


def _beside(item: Node, name: str, crc32: int | None) -> TensorData:
    """Look at sinks or segments, which all entries of a batch dim share."""
    reject, wanted = item.file.reject, np.dtype(BESIDE[name])
    node = item.child(name)
    if node is None or not node.is_dataset:
        raise reject(f"{name} is no dataset", f"store its {name}, one dim of {wanted}")
    storage = node.storage()
    if len(storage.shape) != 1 or storage.dtype != wanted.newbyteorder("<"):
        found = storage.dtype or storage.stored
        raise reject(
            f"{name} holds {found} {list(storage.shape)}",
            f"store one dim of {wanted}, little-endian",
        )
    dim = None if name == "sinks" else 0
    return TensorData(storage.shape, wanted, node, storage, dim, crc32=crc32)


def _fix_of(stored: str, path: str) -> str:
    """What makes numbers readable that aren't BF16 or FP16; see `stored_as` for the words."""
    if stored.startswith("a 16-bit integer"):
        return (
            "if these are the bits of BF16, give it the attribute dtype='bfloat16', or rewrite "
            f"it: {_convert(path)} --bits bf16"
        )
    if stored in ("a float of 4 bytes", "a float of 8 bytes"):
        return f"round it: {_convert(path)} --dtype bf16 (or fp16)"
    return "store BF16 or FP16"


def _convert(path: str) -> str:
    return f"mdattn convert {shlex.quote(path)} NEW.h5"


def _problem(item: Node, tensors: dict[str, TensorData]) -> AttentionProblem:
    """Compare the three tensors with one another, and make one problem of them."""
    reject = item.file.reject
    query, key, value = (tensors[name] for name in TENSORS)

    def same(what: str, values: Sequence[object], fix: str) -> None:
        if len(set(values)) > 1:
            raise reject(
                f"{what} disagree: "
                + ", ".join(f"{n} {v}" for n, v in zip(TENSORS, values, strict=True)),
                fix,
            )

    same("dtypes", [d.dtype for d in (query, key, value)], "store all three in one dtype")
    batch = [d.storage.shape[:-3] for d in (query, key, value)]
    same("batch dims", [b[0] if b else "none" for b in batch], "give all three the same")
    causal, scale, softcap = (item.attribute(name) for name in ("causal", "scale", "softcap"))
    sinks = tensors.get("sinks")
    if sinks and sinks.shape != query.shape[1:2]:
        raise reject(f"{sinks.shape[0]} sinks", f"store one for each of {query.shape[1]} heads")
    try:
        return problem_of(
            [data.shape for data in (query, key, value)],
            query.dtype.name,
            str(causal) if causal is not None else "none",
            scale,  # type: ignore[arg-type]  # checked there
            window=_window(item),
            softcap=0.0 if softcap is None else softcap,
            sinks=sinks is not None,
            segments=_segments(item, tensors.get("segments")),
        )
    except RejectedError as error:
        raise reject(f"{error.what} (shapes {_shapes(tensors)})", error.fix) from None


def _window(item: Node) -> tuple[int, ...]:
    if "window" not in item.attribute_names():
        return UNBOUNDED
    window = item.numbers("window", 2)
    if window is None:
        raise item.file.reject("attribute window isn't two integers", "store before and after")
    return window


def _segments(item: Node, data: TensorData | None) -> tuple[int, ...]:
    """Read the first tokens of the documents: they say what is to be computed."""
    if data is None:
        return ()
    if not 1 <= data.shape[0] <= MAX_SEGMENTS:
        fix = f"store one to {MAX_SEGMENTS} first tokens of documents"
        raise item.file.reject(f"{data.shape[0]} segments", fix)
    found = np.empty(data.shape, data.dtype)
    try:
        data.read((Span(0, len(found)),), found)
    except OSError as error:
        raise item.file.reject(f"segments can't be read: {error}", "copy the file again") from None
    return tuple(found.tolist())


def _shapes(tensors: dict[str, TensorData]) -> str:
    return ", ".join(f"{name} {list(tensors[name].storage.shape)}" for name in TENSORS)
