"""What a dataset holds: every selected item is looked at, nothing is read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY, Stored
from mdattn_mpi.dataset.hdf5 import File, Node, Storage
from mdattn_mpi.dataset.layout import (
    DATASET_FORMAT,
    ITEMS,
    LAYOUTS,
    MAX_ITEMS,
    TENSORS,
    VERSION,
    Item,
    Layout,
    Tensor,
    batch_item_name,
    item_name_fault,
    natural_order,
    shown,
)
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem


@dataclass(frozen=True)
class TensorData:
    """One tensor of one item: what it looks like and where it lies."""

    tokens: int
    heads: int
    head_dim: int
    layout: Layout
    stored: Stored
    storage: Storage
    node: Node
    position: int | None = None  # in the batch dim
    crc32: int | None = None  # of the whole dataset, where its writer has noted it

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype."""
        return NUMPY[self.stored.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all heads."""
        return self.heads * self.head_dim * 2

    @property
    def nbytes(self) -> int:
        """Bytes of this item's part."""
        return self.tokens * self.token_bytes

    @property
    def offset(self) -> int | None:
        """Where this item's part begins in the file; None when only HDF5 can read it."""
        if self.storage.offset is None:
            return None
        return self.storage.offset + (self.position or 0) * self.nbytes


@dataclass(frozen=True)
class Entry:
    """An item that can be done."""

    name: str
    problem: AttentionProblem
    tensors: dict[Tensor, TensorData]


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
            f"has no attribute format, so it is no {wanted}",
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


def select_items(items: Sequence[Item], patterns: Sequence[str], file: str) -> list[Item]:
    """Choose the items whose names match.

    Raises
    ------
    RejectedError
        A pattern matches none.

    """
    for pattern in patterns:
        if not any(fnmatchcase(item.name, pattern) for item in items):
            raise _no_match(pattern, [item.name for item in items], file)
    return [item for item in items if any(fnmatchcase(item.name, p) for p in patterns)]


def _no_match(pattern: str, names: Sequence[str], file: str) -> RejectedError:
    close = get_close_matches(pattern, [shown(name) for name in names[:10_000]], 3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see `mdattn inspect`"
    return RejectedError(f"no item matches {pattern!r}", fix=hint, file=file)


def find_entries(
    file: File, patterns: Sequence[str], layout: str
) -> tuple[list[Entry], list[RejectedError]]:
    """Look at the items that `patterns` match; return the good ones and what is wrong with others.

    Raises
    ------
    RejectedError
        The file is no dataset, or a pattern matches nothing.

    """
    root = file.root
    check_format(root, DATASET_FORMAT)
    group = root.child(ITEMS)
    if group is None or not group.is_group:
        raise file.reject(f"has no group /{ITEMS}", "see docs/file-format.md")
    default = layout if layout != "auto" else str(root.attribute("layout") or "token_major")
    names = sorted(group.names(), key=natural_order)
    found: list[Entry] = []
    faults: list[RejectedError] = []
    for name in names:
        if not any(may_match(name, pattern) for pattern in patterns):
            continue
        try:
            entries = _entries(group, name, layout, default)
        except RejectedError as fault:
            fault.item = shown(name)
            if any(fnmatchcase(n, p) for n in (name, f"{name}.0") for p in patterns):
                faults.append(fault)
            continue
        found += [e for e in entries if any(fnmatchcase(e.name, p) for p in patterns)]
        if len(found) > MAX_ITEMS:
            raise file.reject(f"has more than {MAX_ITEMS} items", "select some, or split the file")
    _check_selection(file, patterns, names, found, faults)
    return found, faults


def may_match(name: str, pattern: str) -> bool:
    """Whether `pattern` may match the item, or an entry of its batch dim."""
    literal = pattern.split("*")[0].split("?")[0].split("[")[0]
    batch = batch_item_name(name, 0)[:-1]
    return fnmatchcase(name, pattern) or batch.startswith(literal) or literal.startswith(batch)


def _check_selection(
    file: File,
    patterns: Sequence[str],
    names: Sequence[str],
    found: Sequence[Entry],
    faults: Sequence[RejectedError],
) -> None:
    """Every pattern matches something, and every name is there once."""
    taken: set[str] = set()
    for entry in found:
        if entry.name in taken:
            raise file.reject(
                f"two items are called {entry.name!r}: one of them is an entry of a batch dim",
                "rename one of them",
            )
        taken.add(entry.name)
    taken |= {fault.item for fault in faults}
    if not names:
        raise file.reject(f"/{ITEMS} is empty", "put at least one item into it")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in taken):
            raise _no_match(pattern, names, file.path)


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


def _entries(group: Node, name: str, layout: str, default: str) -> list[Entry]:
    """Look at one item, or at all entries of its batch dim."""
    reject = group.file.reject
    fault = item_name_fault(name)
    if fault:
        raise reject(f"its name {fault}", "rename it")
    item = group.child(name)
    if item is None or not item.is_group:
        raise reject("is no group", f"store it as /{ITEMS}/{name}/query, key and value")
    chosen = str(item.attribute("layout") or default) if layout == "auto" else layout
    if chosen not in LAYOUTS:
        raise reject(f"layout is {shown(chosen)!r}", f"use {' or '.join(LAYOUTS)}")
    crc32s = item.numbers("crc32", len(TENSORS)) or (None,) * len(TENSORS)
    tensors = {
        tensor: _tensor(item, tensor, chosen, crc32)
        for tensor, crc32 in zip(TENSORS, crc32s, strict=True)
    }
    problem = _problem(item, tensors)
    query = tensors["query"]
    if len(query.storage.shape) == 3:
        return [Entry(name, problem, tensors)]
    if query.storage.shape[0] > MAX_ITEMS:
        raise reject(f"its batch dim has more than {MAX_ITEMS} entries", "split the file")
    return [
        Entry(
            batch_item_name(name, position),
            problem,
            {tensor: replace(data, position=position) for tensor, data in tensors.items()},
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
            "rewrite it with `mdattn convert`; uint16 takes the attribute dtype='bfloat16'",
        )
    if not stored.little_endian:
        raise reject(f"{tensor} is big-endian", "rewrite it with `mdattn convert`")
    first, second, head_dim = storage.shape[-3:]
    tokens, heads = (first, second) if layout == "token_major" else (second, first)
    return TensorData(
        tokens,
        heads,
        head_dim,
        "token_major" if layout == "token_major" else "head_major",
        stored,
        storage,
        node,
        crc32=crc32,
    )


def _problem(item: Node, tensors: dict[Tensor, TensorData]) -> AttentionProblem:
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

    same("dtypes", [d.stored.dtype for d in (query, key, value)], "store all three in one dtype")
    batch = [d.storage.shape[:-3] for d in (query, key, value)]
    same("batch dims", [b[0] if b else "none" for b in batch], "give all three the same")
    shapes = f"key is {list(key.storage.shape)} and value {list(value.storage.shape)}"
    if (key.tokens, key.heads) != (value.tokens, value.heads):
        raise reject(f"key and value disagree: {shapes}", "give both the same tokens and heads")
    if query.head_dim != key.head_dim:
        raise reject(
            f"head dims disagree: query {query.head_dim}, key {key.head_dim}",
            "give query and key the same head dim",
        )
    causal, scale = item.attribute("causal"), item.attribute("scale")
    if isinstance(scale, str) or scale == 0:
        raise reject(f"scale is {scale!r}", "use a positive number, or leave it out for 1/√H")
    try:
        return AttentionProblem(
            q_tokens=query.tokens,
            kv_tokens=key.tokens,
            q_heads=query.heads,
            kv_heads=key.heads,
            head_dim=query.head_dim,
            v_head_dim=value.head_dim,
            dtype=query.stored.dtype,
            causal=str(causal) if causal is not None else "none",  # type: ignore[arg-type]
            scale=float(scale) if scale is not None else 0.0,
        )
    except RejectedError as error:
        raise reject(f"{error.what} (shapes {_shapes(tensors)})", error.fix) from None


def _shapes(tensors: dict[Tensor, TensorData]) -> str:
    return ", ".join(f"{name} {list(data.storage.shape)}" for name, data in tensors.items())
