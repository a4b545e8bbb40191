"""Positions that a model counts from its token ids, as those of the RoBERTa family do.

``CumSum(ids ≠ padding)`` gives every token its place among those that aren't padding. Where padding
comes last, if at all, that is its place in the sequence, which no other token has a part in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mdattn_mpi.onnx.axes import TokenDim
from mdattn_mpi.onnx.graph import Links, set_nodes
from mdattn_mpi.onnx.model import (
    attribute_of,
    constant_of,
    graph_inputs,
    import_onnx,
    labels_of,
    name_of,
    operator,
)

Places = Mapping[str, Sequence[TokenDim]]


class Comparison(NamedTuple):
    """``ids ≠ padding``, as numbers of an element type of ONNX."""

    ids: str  # an input of the model
    padding: int
    kind: int


def count_all_tokens(model: Any, places: Places) -> tuple[list[str], dict[str, int]]:
    """Let what counts the tokens that aren't padding count them all, in place.

    `places` are the dims of the inputs that count tokens. Return what was done, in words, and the
    id that an input of the model must not hold now, by its name.
    """
    onnx, links = import_onnx(), Links(model)
    dims = {value.name: len(labels_of(value)) for value in graph_inputs(model)}
    nodes: list[Any] = []
    done, paddings = [], {}
    for node in model.graph.node:
        found = _comparison(links, node.input[0]) if operator(node) == "CumSum" else None
        if found and _counts_from_the_first(links, node, places, dims):
            shape, ones = (f"{node.output[0]}_mdattn_{name}" for name in ("shape", "ones"))
            one = onnx.helper.make_tensor("one", found.kind, [1], [1])
            nodes += [
                onnx.helper.make_node("Shape", [found.ids], [shape], name=shape),
                onnx.helper.make_node("ConstantOfShape", [shape], [ones], name=ones, value=one),
            ]
            node.input[0] = ones
            paddings[found.ids] = found.padding
            done.append(
                f"{name_of(node)}: counts the tokens of {found.ids!r} that aren't "
                f"{found.padding}, which it must not hold"
            )
        nodes.append(node)
    if done:
        set_nodes(model.graph, nodes)
    return done, paddings


def _counts_from_the_first(
    links: Links, node: Any, places: Places, dims: Mapping[str, int]
) -> bool:
    """Whether a CumSum over a comparison of ids counts these, each its own among them."""
    axis = constant_of(links.graph, node.input[1])
    if axis is None or attribute_of(node, "exclusive", 0) or attribute_of(node, "reverse", 0):
        return False
    found = _comparison(links, node.input[0])
    own = places.get(found.ids, ()) if found else ()
    return found is not None and [place.dim for place in own] == [int(axis) % dims[found.ids]]


def _comparison(links: Links, tensor: str) -> Comparison | None:
    """Return what a tensor is 1 for; None where it is anything else."""
    node, kind, turned = links.maker(tensor), 0, False
    while node is not None and operator(node) in ("Cast", "Identity", "Not"):
        kind = kind or (attribute_of(node, "to", 0) if operator(node) == "Cast" else 0)
        turned ^= operator(node) == "Not"
        node = links.maker(node.input[0])
    if node is None or operator(node) != "Equal" or not turned or not kind:
        return None
    for ids, padding in (node.input, reversed(node.input)):
        numbers = links.compared_with(ids)
        if padding in numbers:
            return Comparison(ids, numbers[padding], kind)
    return None
