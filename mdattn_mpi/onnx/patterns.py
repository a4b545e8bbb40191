"""Attention in single steps, as many exporters write it, made one node.

``MatMul(q, kᵀ)``, perhaps a scale and casts, ``Softmax`` over the keys, ``MatMul(·, v)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.axes import infer_shapes, labels_of, skeleton
from mdattn_mpi.onnx.model import attribute_of, constant_of, import_onnx, name_of, operator, reads

SCALES = ("Mul", "Div", "Cast")
MASKS = ("Add", "Where")


@dataclass
class Pattern:
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
    readers = _Readers(model)
    done = []
    for softmax in [node for node in model.graph.node if operator(node) == "Softmax"]:
        pattern = _match(model, readers, softmax)
        if pattern:
            _check_dims(readers, pattern)
            _replace(model, pattern)
            done.append(
                f"{name_of(pattern.softmax)}: attention in {len(pattern.between) + 3} nodes, "
                f"made one TRT_Attention"
            )
    return done


class _Readers:
    """Who makes a tensor, and who reads it."""

    def __init__(self, model: Any) -> None:
        self._nodes = list(model.graph.node)
        self._outputs = {value.name for value in model.graph.output}
        self._weights = {tensor.name for tensor in model.graph.initializer}
        graph = infer_shapes(skeleton(model))
        self._shapes = {value.name: labels_of(value) for value in (*graph.input, *graph.value_info)}

    def product_of_tensors(self, node: Any) -> bool:
        """Whether a node multiplies two tensors, neither of which is a weight."""
        return (
            node is not None
            and operator(node) == "MatMul"
            and not any(self.is_weight(name) for name in node.input)
        )

    def is_weight(self, tensor: str) -> bool:
        """Whether a tensor is a constant of the model."""
        maker = self.maker(tensor)
        return tensor in self._weights or (maker is not None and operator(maker) == "Constant")

    def dims(self, tensor: str) -> int | None:
        """Count the dims of a tensor; None where that isn't known."""
        return len(self._shapes[tensor]) if tensor in self._shapes else None

    def maker(self, tensor: str) -> Any:
        return next((node for node in self._nodes if tensor in node.output), None)

    def only_reader(self, tensor: str) -> Any:
        """Return the one node that reads `tensor`; None when there are more, or it is an output."""
        found = [node for node in self._nodes if tensor in reads(node)]
        return found[0] if len(found) == 1 and tensor not in self._outputs else None


def _match(model: Any, readers: _Readers, softmax: Any) -> Pattern | None:
    """Walk up from a Softmax to the product of queries and keys, and down to that with values."""
    between: list[Any] = []
    scale = 1.0
    node = readers.maker(softmax.input[0])
    while node is not None and operator(node) in (*SCALES, *MASKS):
        if operator(node) in MASKS:
            if any(_leads_to_product(readers, name) for name in node.input):
                raise RejectedError(
                    f"{name_of(node)} adds a mask to the scores of an attention: it can't be "
                    "cut into token shards",
                    fix="export the model with is_causal instead of a mask, or use -n 1",
                )
            return None
        if operator(node) != "Cast":
            factor = _scalar(model, node)
            if factor is None:
                return None
            scale *= factor if operator(node) == "Mul" else 1 / factor
        between.append(node)
        node = readers.maker(_data_input(model, node))
    if not readers.product_of_tensors(node):
        return None
    first, weights = node, softmax.output[0]
    after = readers.only_reader(weights)
    while after is not None and operator(after) == "Cast":
        between.append(after)
        weights = after.output[0]
        after = readers.only_reader(weights)
    if after is None or operator(after) != "MatMul" or after.input[0] != weights:
        return None
    inside = [first, *between]
    if any(readers.only_reader(each.output[0]) is None for each in inside):
        return None
    return Pattern(first, softmax, after, between, scale)


def _leads_to_product(readers: _Readers, tensor: str) -> bool:
    node = readers.maker(tensor)
    while node is not None and operator(node) in SCALES:
        node = readers.maker(node.input[0])
    return readers.product_of_tensors(node)


def _data_input(model: Any, node: Any) -> str:
    """Return the input of a scaling that isn't the factor."""
    if operator(node) == "Mul" and constant_of(model.graph, node.input[0]) is not None:
        return str(node.input[1])
    return str(node.input[0])


def _scalar(model: Any, node: Any) -> float | None:
    """Return the factor of a Mul, or the divisor of a Div."""
    number = 0 if _data_input(model, node) == node.input[1] else 1
    value = constant_of(model.graph, node.input[number])
    if value is None or np.size(value) != 1:
        return None
    return float(np.asarray(value).astype(np.float64).reshape(()))


def _check_dims(readers: _Readers, pattern: Pattern) -> None:
    """Make sure that heads have a dim of their own, and that the keys are last."""
    dims = readers.dims(pattern.first.input[0])
    if dims not in (None, 4) or attribute_of(pattern.softmax, "axis", -1) not in (-1, 3):
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
