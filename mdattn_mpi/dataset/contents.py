"""What an output holds: its items, where their tensors lie, and its ledger, from the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.hdf5 import ANY, Node, Value
from mdattn_mpi.dataset.layout import (
    ITEMS,
    LEDGER,
    AnyItem,
    Item,
    ModelItem,
    item_name_fault,
    shown,
)
from mdattn_mpi.dataset.ledger import ledger_columns
from mdattn_mpi.dataset.positioned import Region
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AnyProblem, AttentionProblem, ModelProblem, TensorSpec

P = TypeVar("P")

_ANEW = "start over: --overwrite"


@dataclass(frozen=True)
class Contents:
    """Items in the order of the ledger, and where their tensors and the ledger's columns lie."""

    items: tuple[AnyItem, ...]
    regions: list[dict[str, Region]]
    ledger: dict[str, Region]
    lse: bool


def contents_of(root: Node) -> Contents:
    """Look at everything in an output.

    Raises
    ------
    RejectedError
        Something isn't as the format says.

    """
    reject = root.file.reject
    group, book = root.child(ITEMS), root.child(LEDGER)
    if group is None or book is None:
        raise reject(f"has no group /{ITEMS} or no group /{LEDGER}", _ANEW)
    found = [_item(group, name) for name in group.names()]
    found.sort(key=lambda pair: pair[0].index)
    items = tuple(item for item, _ in found)
    regions = [results for _, results in found]
    if [item.index for item in items] != list(range(len(items))):
        raise reject("its items aren't numbered 0, 1, 2, …", _ANEW)
    lse = {
        "lse" in found for item, found in zip(items, regions, strict=True) if isinstance(item, Item)
    }
    if len(lse) > 1:
        raise reject("some of its items have an lse and some don't", _ANEW)
    ledger = _ledger_regions(book, len(items))
    _check_apart(root, [region for each in (ledger, *regions) for region in each.values()])
    return Contents(items, regions, ledger, lse == {True})


def _item(group: Node, name: str) -> tuple[AnyItem, dict[str, Region]]:
    """Read what was to be computed of one item, and compare its datasets with that."""
    reject = group.file.reject
    fault = item_name_fault(name)
    node = group.child(name) if not fault else None
    if node is None:
        raise reject(f"item {shown(name)!r}: its name {fault or 'leads nowhere'}", _ANEW)
    index = node.attribute("index")
    if not isinstance(index, int):
        raise reject(f"item {name!r}: index is {index!r}", _ANEW)
    item: AnyItem
    if node.attribute("tensors") is not None:
        item = ModelItem(name, index, _from_json(node, "tensors", _model_problem))
        outputs = item.problem.outputs
    else:
        make = _attention_problem
        item = Item(name, index, _from_json(node, "problem", make))
        outputs = item.problem.outputs(lse=node.child("lse") is not None)
    return item, {tensor.name: node.region(tensor, _ANEW) for tensor in outputs}


def describe(problem: AnyProblem) -> dict[str, Value]:
    """Put what is to be computed of an item into attributes, from which it is read again."""
    if isinstance(problem, AttentionProblem):
        return {"problem": json.dumps(problem.facts())}
    outputs = {
        each.name: {"shape": each.shape, "dtype": each.dtype, "token_dim": each.token_dim}
        for each in problem.outputs
    }
    return {"tensors": json.dumps({"tokens": problem.tokens, "outputs": outputs})}


def _from_json(node: Node, attribute: str, make: Callable[[Any], P]) -> P:
    text = node.attribute(attribute)
    try:
        return make(json.loads(str(text)))
    except (RejectedError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise node.file.reject(
            f"{node.path}: its {attribute} is {shown(str(text))} ({error})", _ANEW
        ) from None


def _attention_problem(fields: Any) -> AttentionProblem:
    return AttentionProblem(**fields)


def _model_problem(fields: Any) -> ModelProblem:
    """Make a problem of JSON; refuse what no model gives."""
    tokens = fields["tokens"]
    outputs = tuple(
        TensorSpec(name, tuple(each["shape"]), each["dtype"], each["token_dim"])
        for name, each in fields["outputs"].items()
    )
    for tensor in outputs:
        number = tensor.dtype in NUMPY or np.dtype(tensor.dtype).kind in "fiu"
        if not number or not all(type(dim) is int and dim > 0 for dim in tensor.shape):
            raise ValueError(f"dtype or shape of {shown(tensor.name)!r}")
        at = tensor.token_dim
        if at is not None and (
            tensor.shape[at] != tokens or any(n != 1 for n in tensor.shape[:at])
        ):
            raise ValueError(f"token_dim of {shown(tensor.name)!r}")
    if type(tokens) is not int or tokens < 1:
        raise ValueError("tokens")
    return ModelProblem(tokens, outputs)


def _ledger_regions(book: Node, items: int) -> dict[str, Region]:
    crc32 = book.child("crc32")
    shape = crc32.storage().shape if crc32 is not None and crc32.is_dataset else ()
    width = shape[1] if len(shape) == 2 else 0
    return {each.name: book.region(each, _ANEW) for each in ledger_columns(items, width, ANY)}


def _check_apart(root: Node, regions: Sequence[Region]) -> None:
    """No two datasets share bytes: writing one would change the other."""
    end = 0
    for region in sorted(regions, key=lambda region: region.offset):
        if region.offset < end:
            raise root.file.reject("two of its datasets overlap", _ANEW)
        end = region.stop
