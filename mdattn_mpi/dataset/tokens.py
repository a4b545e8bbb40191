"""Opening a file of token ids: what a transformer reads.

``/items/<name>/input_ids`` is ``[S]``; an optional ``segments`` holds the first token of each
document that is packed into it, ascending from 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.dataset.hdf5 import File, Node
from mdattn_mpi.dataset.index import check_format, chosen_names, first_of, item_group, patterns_of
from mdattn_mpi.dataset.layout import (
    DATASET_FORMAT,
    ITEMS,
    TOKEN_DTYPES,
    AnyItem,
    ModelItem,
    natural_order,
    shown,
)
from mdattn_mpi.dataset.tensors import TensorData, TensorFile
from mdattn_mpi.dataset.unknown import misplaced_in, refuse_unknown, unknown_in
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import ModelProblem, Span, digest_of

Ids = NDArray[np.int64]
MakeProblem = Callable[[int, int], ModelProblem]

OF_ATTENTION = (
    "causal",
    "scale",
    "window",
    "softcap",
    "layout",
)  # attributes that mean nothing here


class TokenFile(TensorFile):
    """An open file of token ids; any thread may read.

    Attributes
    ----------
    items
        The selected items that can be done, in natural order of their names.
    faults
        The selected items that can't be; empty unless `open_tokens` was told to keep them.

    """

    items: tuple[ModelItem, ...]

    def __init__(
        self,
        file: File,
        items: Sequence[ModelItem],
        tensors: dict[str, dict[str, TensorData]],
        faults: Sequence[RejectedError],
    ) -> None:
        super().__init__(file, items, tensors)
        self.faults = tuple(faults)

    def __enter__(self) -> TokenFile:
        return self

    def documents(self, item: AnyItem) -> int:
        """Count the documents that an item is packed of; one where it isn't."""
        found = self._tensors[item.name].get("segments")
        return found.shape[0] if found else 1

    def ids(self, item: AnyItem, spans: Sequence[Span] | None = None) -> Ids:
        """Read the ids of the tokens in `spans`, one span after the other; all by default.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        whole = (Span(0, item.problem.tokens),)
        return self.read(item, "input_ids", whole if spans is None else spans).astype(np.int64)

    def starts(self, item: AnyItem) -> Ids:
        """Read the first token of each document, ``[documents]``; 0 alone where none is packed.

        Raises
        ------
        ItemError
            They don't begin with 0, don't ascend, or leave the sequence; the file can't be read.

        """
        if "segments" not in self._tensors[item.name]:
            return np.zeros(1, np.int64)
        found: Ids = self.read(item, "segments", (Span(0, self.documents(item)),))
        good = (np.diff(found, prepend=-1) > 0) & (found < item.problem.tokens)
        good[0] &= found[0] == 0
        if not good.all():
            at = int(np.argmin(good))
            raise ItemError(
                f"segments[{at}] is {found[at]}, after {found[at - 1] if at else 'nothing'}, of "
                f"{item.problem.tokens} tokens",
                fix="store the first token of each document: 0, then ever larger ones",
                file=self.path,
                item=item.name,
            )
        return found

    def describe(self, item: AnyItem) -> str:
        """Say what an item holds, and what is to be made of it."""
        packed = "segments" in self._tensors[item.name]
        text = f"{item.problem.tokens} tokens"
        text += f" of {self.documents(item)} documents" if packed else ""
        given = (f"{o.name} {o.dtype} {list(o.shape)}" for o in item.problem.outputs)  # type: ignore[union-attr]
        return ", giving ".join(filter(None, (text, ", ".join(given))))

    def _meaning(self, item: AnyItem) -> int:
        return digest_of({"tokens": item.problem.tokens})


def open_tokens(
    path: str | os.PathLike[str],
    problem: MakeProblem = lambda tokens, documents: ModelProblem(tokens, ()),
    *,
    select: str = "*",
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep_faults: bool = False,
    catalog: bytes | None = None,
) -> TokenFile:
    """Open a file of token ids and look at every selected item.

    Parameters
    ----------
    path
        The file.
    problem
        Says what is to be made of an item, given its tokens and documents.
    select, allow, ignore, keep_faults, catalog
        As of `mdattn_mpi.dataset.reader.open_dataset`.

    Raises
    ------
    RejectedError
        The file, or one of the selected items, is not as the format says.

    """
    file = File(path, allow, select=select, catalog=catalog)
    try:
        return _open(file, problem, ignore, keep_faults)
    except BaseException:
        file.close()
        raise


def holds_tokens(path: str | os.PathLike[str], allow: Sequence[str] = ()) -> bool:
    """Say whether some item of a file has token ids.

    Raises
    ------
    RejectedError
        It can't be opened.

    """
    with File(path, allow) as file:
        group = file.root.child(ITEMS)
        if group is None or not group.is_group:
            return False
        return any("input_ids" in names for names in _names_of_items(group))


def _names_of_items(group: Node) -> Iterator[Collection[str]]:
    for name in group.names():
        try:
            child = group.child(name)
        except RejectedError:
            continue
        if child is not None and child.is_group:
            yield child.names()


def _open(file: File, problem: MakeProblem, ignore: Sequence[str], keep: bool) -> TokenFile:
    group = _items_of(file, ignore)
    items: list[ModelItem] = []
    tensors: dict[str, dict[str, TensorData]] = {}
    faults: list[RejectedError] = []
    for name in sorted(
        chosen_names(set(group.names()), patterns_of(file.select), file.path), key=natural_order
    ):
        try:
            found = _tensors(group, name, ignore)
            segments = found.get("segments")
            made = problem(found["input_ids"].shape[0], segments.shape[0] if segments else 1)
        except RejectedError as fault:
            fault.file, fault.item = fault.file or file.path, shown(name)
            faults.append(fault)
            continue
        tensors[name] = found
        items.append(ModelItem(name, len(items), made))
    if faults and not keep:
        raise first_of(faults)
    return TokenFile(file, items, tensors, faults)


def _items_of(file: File, ignore: Sequence[str]) -> Node:
    """Find /items; a file that states a format must state ours."""
    root = file.root
    if root.attribute("format") is not None:
        check_format(root, DATASET_FORMAT)
    group = root.child(ITEMS)
    if group is None or not group.is_group:
        raise file.reject(
            f"has no group /{ITEMS}", "make one with `mdattn convert TEXTS OUT.h5 --tokenizer DIR`"
        )
    refuse_unknown((*misplaced_in(root), *misplaced_in(group)), ignore, file.path)
    if not group.names():
        raise file.reject(f"/{ITEMS} is empty", "put at least one item into it")
    return group


def _tensors(group: Node, name: str, ignore: Sequence[str]) -> dict[str, TensorData]:
    """Look at one item."""
    reject = group.file.reject
    item = item_group(group, name, "input_ids")
    if item.child("input_ids") is None:
        fix = (
            "leave --model out: it holds query, key and value"
            if item.child("query")
            else "store its token ids, [S]"
        )
        raise reject("has no dataset 'input_ids'", fix)
    refuse_unknown(_unknown(item), ignore, group.file.path)
    present = [tensor for tensor in TOKEN_DTYPES if item.child(tensor) is not None]
    crc32s = item.numbers("crc32", len(present)) or (None,) * len(present)
    found = {
        tensor: _tensor(item, tensor, crc32) for tensor, crc32 in zip(present, crc32s, strict=True)
    }
    tokens = found["input_ids"].shape[0]
    if "segments" in found and found["segments"].shape[0] > tokens:
        raise reject(
            f"{found['segments'].shape[0]} segments of {tokens} tokens",
            "store the first token of each document, not a number for every token",
        )
    return found


def _unknown(item: Node) -> Iterator[tuple[str, str]]:
    yield from unknown_in(item, (*TOKEN_DTYPES, "names"))
    for name in item.attribute_names():
        if name in OF_ATTENTION:
            yield name, f"attribute {name}, which only counts for query, key and value"


def _tensor(item: Node, tensor: str, crc32: int | None) -> TensorData:
    reject = item.file.reject
    node = item.child(tensor)
    if node is None or not node.is_dataset:
        raise reject(f"{tensor} is no dataset", f"store its {tensor}")
    storage, allowed = node.storage(), TOKEN_DTYPES[tensor]
    if len(storage.shape) != 1 or 0 in storage.shape:
        raise reject(
            f"{tensor} has shape {list(storage.shape)}",
            "store one sequence, [S], an item; S is at least 1",
        )
    dtype = storage.dtype
    if dtype is None or dtype.newbyteorder("<").str not in (np.dtype(d).str for d in allowed):
        raise reject(
            f"{tensor} holds {dtype or storage.stored}", f"store {', '.join(allowed)} numbers"
        )
    if dtype.byteorder == ">":
        raise reject(f"{tensor} is big-endian", "store little-endian numbers")
    return TensorData(storage.shape, dtype, node, storage, crc32=crc32)
