"""Attention in single steps, as many exporters write it, made one node.

``MatMul(q, kᵀ)``, perhaps a scale, casts and a mask, ``Softmax`` over the keys, ``MatMul(·, v)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.axes import at_lengths
from mdattn_mpi.onnx.graph import Links, prune, set_nodes
from mdattn_mpi.onnx.lengths import ANY, Lengths
from mdattn_mpi.onnx.masks import BLOCKED
from mdattn_mpi.onnx.model import attribute_of, constant_of, name_of, operator
from mdattn_mpi.onnx.nodes import Nodes

SCALES = ("Mul", "Div", "Cast")
# What may stand between products and Softmax in attentions of any kind.
_CHANGES = """
Add Cast Clip Concat DequantizeLinear Div Expand Flatten Gather GatherElements Identity Max Min Mul
QuantizeLinear Reshape Slice Squeeze Sub Tanh Transpose Unsqueeze Where
"""
CHANGES = frozenset(_CHANGES.split())
PRODUCTS = ("MatMul", "Einsum")


class Mask(NamedTuple):
    """What blocks keys: a tensor that is added to the scores, or a condition."""

    tensor: str
    kind: str  # "added", "seen" where true, "blocked" where true


class Pattern(NamedTuple):
    """The nodes of one attention, from the first product to the second."""

    first: Any
    softmax: Any
    second: Any
    between: list[Any]
    scale: float
    softcap: float  # 0: none
    masks: list[Mask]


class Unknown(NamedTuple):
    """A Softmax between two products that is no attention as we know it."""

    products: list[str]  # what the first ones make
    error: RejectedError


def fuse_patterns(model: Any) -> list[str]:
    """Put a ``TRT_Attention`` in place of every pattern, with its mask as the fourth input.

    Return what was done, in words.

    Raises
    ------
    RejectedError
        A pattern whose heads aren't a dim of their own.

    """
    done = []
    softmaxes = [node for node in model.graph.node if operator(node) == "Softmax"]
    shapes = Lengths(model, at_lengths(model, {}, {}, (ANY,))).shapes if softmaxes else {}
    for softmax in softmaxes:
        links = Links(model)
        pattern = _match(links, softmax)
        if pattern:
            _check_dims(pattern, shapes)
            _replace(model, pattern)
            nodes = len(pattern.between) + 3
            done.append(f"{name_of(softmax)}: attention in {nodes} nodes, made one TRT_Attention")
    if done:
        prune(model.graph)
    return done


def unknown_attentions(model: Any) -> list[Unknown]:
    """List the Softmaxes that `fuse_patterns` left, and that stand between two products."""
    links = Links(model)
    found = []
    for node in model.graph.node:
        if operator(node) == "Softmax" and _feeds_product(links, node.output[0]):
            changes = _from_products(links, node.input[0])
            products = [each for each in changes if operator(each) in PRODUCTS]
            if any(not any(map(links.is_weight, each.input)) for each in products):
                error = RejectedError(
                    f"{name_of(node)} is of an attention {_difference(links, changes)}",
                    fix="use a model without that, or -n 1",
                )
                found.append(Unknown([each.output[0] for each in products], error))
    return found


def _difference(links: Links, changes: list[Any]) -> str:
    """Say what an attention does to its scores, and ours don't."""
    for node in changes:
        if operator(node) == "Add" and all(_from_products(links, each) for each in node.input):
            return f"to whose scores {name_of(node)} adds others, as for relative positions"
    for node in changes:
        known = operator(node) in (*PRODUCTS, "Add", "Tanh", "Where") or _unscale(links, node)
        if not known:
            return f"whose scores go through {name_of(node)}"
    return "in an order of steps that isn't known"


def _from_products(links: Links, tensor: str) -> list[Any]:
    """List what makes scores, from a tensor up to products: of keys, or of learned positions."""
    node = links.maker(tensor)
    if node is None or operator(node) in PRODUCTS:
        return [] if node is None else [node]
    if operator(node) not in CHANGES:
        return []
    found = {id(each): each for name in node.input for each in _from_products(links, name)}
    return [node, *found.values()] if found else []


def _feeds_product(links: Links, weights: str) -> bool:
    """Whether what a Softmax gives is multiplied by something that is no weight."""
    for node in links.readers(weights):
        if operator(node) in CHANGES and _feeds_product(links, node.output[0]):
            return True
        if operator(node) in PRODUCTS and not any(map(links.is_weight, node.input)):
            return True
    return False


def _match(links: Links, softmax: Any) -> Pattern | None:
    """Walk up from a Softmax to the product of queries and keys, and down to that with values."""
    between: list[Any] = []
    masks: list[Mask] = []
    scale, softcap = 1.0, 0.0
    node = links.maker(softmax.input[0])
    while node is not None and not _is_product(links, node):
        if scaled := _unscale(links, node):
            node_before, scale = scaled[0], scale * scaled[1]
        elif operator(node) == "Tanh" and not softcap:  # cap · tanh(scores / cap)
            node_before, softcap = node.input[0], scale
        elif found := _unmask(links, node):
            node_before = found[0]
            masks.append(found[1])
        else:
            return None
        between.append(node)
        node = links.maker(node_before)
    after = _after(links, softmax, between)
    if node is None or after is None:
        return None
    if any(links.only_reader(each.output[0]) is None for each in (node, *between)):
        return None
    return Pattern(node, softmax, after, between, scale, softcap, masks)


def _is_product(links: Links, node: Any) -> bool:
    """Whether a node multiplies two tensors, neither of which is a weight."""
    return (
        node is not None
        and operator(node) == "MatMul"
        and not any(map(links.is_weight, node.input))
    )


def _comes_from_product(links: Links, tensor: str) -> bool:
    """Whether a tensor is scores, which may be scaled, capped and masked already."""
    node = links.maker(tensor)
    while node is not None and not _is_product(links, node):
        if operator(node) == "Tanh":
            node = links.maker(node.input[0])
        elif found := _unscale(links, node) or _unmask(links, node):
            node = links.maker(found[0])
        else:
            return False
    return node is not None


def _unscale(links: Links, node: Any) -> tuple[str, float] | None:
    """Return what a Mul, Div or Cast is applied to, and the factor; None if it's no number."""
    if operator(node) not in SCALES:
        return None
    if operator(node) == "Cast":
        return node.input[0], 1.0
    for number in (1, 0) if operator(node) == "Mul" else (1,):
        value = constant_of(links.graph, node.input[number])
        if value is not None and np.size(value) == 1:
            factor = float(np.asarray(value).astype(np.float64).reshape(()))
            return node.input[1 - number], factor if operator(node) == "Mul" else 1 / factor
    return None


def _unmask(links: Links, node: Any) -> tuple[str, Mask] | None:
    """Return the scores that an Add or Where masks, and the mask."""
    if operator(node) == "Add":
        for scores, added in (node.input, reversed(node.input)):
            if _comes_from_product(links, scores) and not _from_products(links, added):
                return scores, Mask(added, "added")
    if operator(node) == "Where":
        condition, *sides = node.input
        for kind, scores, filler in (("seen", *sides), ("blocked", *reversed(sides))):
            value = constant_of(links.graph, filler)
            blocks = value is not None and np.size(value) == 1 and np.all(value <= BLOCKED)
            if blocks and _comes_from_product(links, scores):
                return scores, Mask(condition, kind)
    return None


def _after(links: Links, softmax: Any, between: list[Any]) -> Any:
    """Walk down to the product with values: over casts, and zeros for rows that see no key."""
    weights = softmax.output[0]
    while True:
        readers = links.readers(weights)
        zeros = [node for node in readers if operator(node) == "IsNaN"]
        if len(readers) == 2 and zeros:
            (other,) = (node for node in readers if node is not zeros[0])
            condition = zeros[0].output[0]
            if operator(other) != "Where" or other.input[0] != condition:
                return None
            if other.input[2] != weights or links.only_reader(condition) is None:
                return None
            between += [other]
            weights = other.output[0]
            continue
        node = links.only_reader(weights)
        if node is not None and operator(node) == "Cast":
            between.append(node)
            weights = node.output[0]
            continue
        right = node is not None and operator(node) == "MatMul" and node.input[0] == weights
        return node if right else None


def _check_dims(pattern: Pattern, shapes: Any) -> None:
    """Make sure that heads have a dim of their own, and that the keys are last."""
    shape = shapes.get(pattern.first.input[0], [None] * 4)  # where it isn't known
    if len(shape) != 4 or attribute_of(pattern.softmax, "axis", -1) not in (-1, 3):
        raise RejectedError(
            f"{name_of(pattern.softmax)} isn't over the keys in the last of four dims",
            fix="export the model with heads as a dim of their own: [B, N, S, H]",
        )


def _replace(model: Any, pattern: Pattern) -> None:
    """Write the attention; the keys, which come transposed, are turned back."""
    query, transposed = pattern.first.input
    name = pattern.softmax.name or pattern.softmax.output[0]
    nodes = Nodes(f"{name}_mdattn")
    key = nodes.add("Transpose", transposed, perm=[0, 1, 3, 2])
    given = [nodes.scaled(query, pattern.scale), key, pattern.second.input[1]]
    if pattern.masks:
        given.append(_one_mask(nodes, pattern.masks))
    cap = {"softcap": pattern.softcap} if pattern.softcap else {}
    nodes.add("TRT_Attention", *given, output=pattern.second.output[0], **cap)
    nodes.made[-1].name = f"{name}_attention"
    model.graph.initializer.extend(nodes.constants)
    gone = {*pattern.first.output, *pattern.softmax.output, *pattern.second.output}
    gone.update(name for node in pattern.between for name in node.output)
    kept: list[Any] = []
    for node in model.graph.node:
        if gone.isdisjoint(node.output):
            kept.append(node)
        elif node.output[0] == pattern.second.output[0]:
            kept += nodes.made
    set_nodes(model.graph, kept)


def _one_mask(nodes: Nodes, masks: list[Mask]) -> str:
    """Put masks together: a condition that is true where all are, or a sum that blocks the rest."""
    seen = ""
    added = ""
    for mask in masks:
        if mask.kind == "added":
            added = nodes.add("Add", added, mask.tensor) if added else mask.tensor
        else:
            own = nodes.add("Not", mask.tensor) if mask.kind == "blocked" else mask.tensor
            seen = nodes.add("And", seen, own) if seen else own
    if not seen or not added:
        return seen or added
    lowest = nodes.narrow(nodes.constant(np.float32(-np.inf)), added)
    return nodes.add("Where", seen, added, lowest)
