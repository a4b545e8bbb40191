"""Attention in single steps, as many exporters write it, made one node.

``MatMul(q, kᵀ)``, perhaps a scale and casts, ``Softmax`` over the keys, ``MatMul(·, v)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import attribute_of, constant_of, import_onnx, name_of, operator, reads
from mdattn_mpi.onnx.shapes import infer_shapes, labels_of

SCALES = ("Mul", "Div", "Cast")
MASKS = ("Add", "Where")


class Pattern(NamedTuple):
    """The nodes of one attention, from the first product to the second."""

    first: Any
    softmax: Any
    second: Any
    between: list[Any]
    scale: float


def fuse_patterns(model: Any) -> list[str]:
    """Put a ``TRT_Attention`` in place of every pattern; return what was done, in words.

    Raises
    ------
    RejectedError
        A pattern with a mask, or whose heads aren't a dim of their own.

    """
    links = _Links(model)
    done = []
    for softmax in [node for node in model.graph.node if operator(node) == "Softmax"]:
        pattern = _match(links, softmax)
        if pattern:
            _check_dims(links, pattern)
            _replace(model, pattern)
            done.append(
                f"{name_of(softmax)}: attention in {len(pattern.between) + 3} nodes, "
                "made one TRT_Attention"
            )
    return done


class _Links:
    """Who makes a tensor, and who reads it."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self._nodes = list(model.graph.node)
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._outputs = {value.name for value in model.graph.output}
        self._weights = {tensor.name for tensor in model.graph.initializer}
        graph = infer_shapes(model, {})
        self.shapes = {value.name: labels_of(value) for value in (*graph.input, *graph.value_info)}

    def maker(self, tensor: str) -> Any:
        """Return the node that makes `tensor`; None for an input or a weight."""
        return self._makers.get(tensor)

    def only_reader(self, tensor: str) -> Any:
        """Return the one node that reads `tensor`; None when there are more, or it is an output."""
        found = [node for node in self._nodes if tensor in reads(node)]
        return found[0] if len(found) == 1 and tensor not in self._outputs else None

    def is_product(self, node: Any) -> bool:
        """Whether a node multiplies two tensors, neither of which is a weight."""
        return (
            node is not None
            and operator(node) == "MatMul"
            and not any(map(self._is_weight, node.input))
        )

    def _is_weight(self, tensor: str) -> bool:
        maker = self.maker(tensor)
        return tensor in self._weights or (maker is not None and operator(maker) == "Constant")

    def unscale(self, node: Any) -> tuple[str, float] | None:
        """Return what a Mul, Div or Cast is applied to, and the factor; None if it's no number."""
        if operator(node) == "Cast":
            return node.input[0], 1.0
        for number in (1, 0) if operator(node) == "Mul" else (1,):
            value = constant_of(self.graph, node.input[number])
            if value is not None and np.size(value) == 1:
                factor = float(np.asarray(value).astype(np.float64).reshape(()))
                return node.input[1 - number], factor if operator(node) == "Mul" else 1 / factor
        return None


def _match(links: _Links, softmax: Any) -> Pattern | None:
    """Walk up from a Softmax to the product of queries and keys, and down to that with values."""
    between: list[Any] = []
    scale = 1.0
    node = links.maker(softmax.input[0])
    while node is not None and operator(node) in SCALES:
        scaled = links.unscale(node)
        if scaled is None:
            return None
        between.append(node)
        node, scale = links.maker(scaled[0]), scale * scaled[1]
    if node is not None and operator(node) in MASKS:
        _refuse_mask(links, node)
    if not links.is_product(node):
        return None
    first, weights = node, softmax.output[0]
    after = links.only_reader(weights)
    while after is not None and operator(after) == "Cast":
        between.append(after)
        weights = after.output[0]
        after = links.only_reader(weights)
    if after is None or operator(after) != "MatMul" or after.input[0] != weights:
        return None
    if any(links.only_reader(each.output[0]) is None for each in (first, *between)):
        return None
    return Pattern(first, softmax, after, between, scale)


def _refuse_mask(links: _Links, mask: Any) -> None:
    for name in mask.input:
        node = links.maker(name)
        while node is not None and operator(node) in SCALES:
            node = links.maker(node.input[0])
        if links.is_product(node):
            raise RejectedError(
                f"{name_of(mask)} adds a mask to the scores of an attention: it can't be "
                "cut into token shards",
                fix="export the model with is_causal instead of a mask, or use -n 1",
            )


def _check_dims(links: _Links, pattern: Pattern) -> None:
    """Make sure that heads have a dim of their own, and that the keys are last."""
    shape = links.shapes.get(pattern.first.input[0], [None] * 4)  # where it isn't known
    if len(shape) != 4 or attribute_of(pattern.softmax, "axis", -1) not in (-1, 3):
        raise RejectedError(
            f"{name_of(pattern.softmax)} isn't over the keys in the last of four dims",
            fix="export the model with heads as a dim of their own: [B, N, S, H]",
        )


def _replace(model: Any, pattern: Pattern) -> None:
    """Write the attention; the keys, which come transposed, are turned back."""
    onnx = import_onnx()
    make = onnx.helper.make_node
    query, transposed = pattern.first.input
    name = pattern.softmax.name or pattern.softmax.output[0]
    key, value = f"{name}_key", pattern.second.input[1]
    nodes = [make("Transpose", [transposed], [key], name=key, perm=[0, 1, 3, 2])]
    if pattern.scale != 1.0:
        factor = onnx.numpy_helper.from_array(np.float32(pattern.scale), f"{name}_scale")
        model.graph.initializer.append(factor)
        wide, product, query_16 = f"{name}_wide", f"{name}_product", f"{name}_query"
        nodes += [
            make("Cast", [query], [wide], name=wide, to=onnx.TensorProto.FLOAT),
            make("Mul", [wide, factor.name], [product], name=product),
            make("CastLike", [product, query], [query_16], name=query_16),
        ]
        query = query_16
    nodes.append(
        make("TRT_Attention", [query, key, value], pattern.second.output, name=f"{name}_attention")
    )
    gone = [pattern.first, *pattern.between, pattern.softmax, pattern.second]
    kept: list[Any] = []
    for node in model.graph.node:
        if any(node is each or node == each for each in gone):
            kept += nodes if node == pattern.second else []
        else:
            kept.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(copies)
