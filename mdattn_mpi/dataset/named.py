"""Items of named tensors of any dtype, ``/items/<name>/<tensor>``: what a model takes.

Each lies in one run, and so do its tokens: what `Region` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mdattn_mpi.dataset.hdf5 import File, Node
from mdattn_mpi.dataset.index import chosen_names, patterns_of
from mdattn_mpi.dataset.layout import ITEMS, ModelItem, item_name_fault, natural_order, shown
from mdattn_mpi.dataset.tensors import TensorData, TensorFile
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import ModelProblem, TensorSpec

_CONTIGUOUS = "store what the model takes, contiguous: h5repack -l CONTI"


def open_tensors(
    file: File, tensors: Sequence[TensorSpec], problem: Callable[[int], ModelProblem]
) -> TensorFile:
    """Find `tensors` in every selected item of `file`, which is closed with what is returned.

    A tensor has -1 in place of the number of tokens; `problem` says what is to be computed of an
    item of so many.

    Raises
    ------
    RejectedError
        An item lacks a tensor, or it isn't as it must be; nothing matches.

    """
    items: list[ModelItem] = []
    found: dict[str, dict[str, TensorData]] = {}
    for node in _items(file):
        name = node.path.rpartition("/")[2]
        try:
            found[name] = {each.name: _input(node, each) for each in tensors}
            items.append(ModelItem(name, len(items), problem(_tokens(node, found[name]))))
        except RejectedError as error:
            error.file, error.item = error.file or file.path, name
            raise
    return TensorFile(file, items, found)


def tensor_names(file: File) -> list[str]:
    """List the tensors of the first selected item."""
    first = next(_items(file))
    return sorted(first.names()) if first.is_group else []


def longest(file: File) -> int:
    """Count the tokens of the longest tensor of all selected items; tokens come first in each."""
    lengths = [1]
    for item in _items(file):
        nodes = (item.child(name) for name in item.names())
        shapes = [node.storage().shape for node in nodes if node is not None and node.is_dataset]
        lengths += [next((dim for dim in shape if dim != 1), 1) for shape in shapes]
    return max(lengths)


def _items(file: File) -> Iterator[Node]:
    """Find the items that are selected, in natural order."""
    group = file.root.child(ITEMS)
    if group is None or not group.is_group:
        raise file.reject(f"has no group /{ITEMS}", "see docs/file-format.md")
    chosen = chosen_names(set(group.names()), patterns_of(file.select), file.path)
    for name in sorted(chosen, key=natural_order):
        fault = item_name_fault(name)
        node = group.child(name) if not fault else None
        if node is None:
            words = f"item {shown(name)!r}: its name {fault or 'leads nowhere'}"
            raise file.reject(words, "rename it")
        yield node


def _input(item: Node, tensor: TensorSpec) -> TensorData:
    region, node = item.region(tensor, _CONTIGUOUS), item.child(tensor.name)
    assert node is not None
    if 0 in region.shape:
        raise item.file.reject(f"{tensor.name} has shape {list(region.shape)}", "store some tokens")
    return TensorData(region.shape, region.dtype, node, node.storage(), tensor.token_dim)


def _tokens(item: Node, found: dict[str, TensorData]) -> int:
    """Count the tokens of an item, on which all its tensors agree."""
    lengths = {
        name: data.shape[data.token_dim]
        for name, data in found.items()
        if data.token_dim is not None
    }
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} has {count}" for name, count in lengths.items()) or "no tensor"
        raise item.file.reject(f"tokens disagree: {told}", "give all the same number")
    return next(iter(lengths.values()))
