"""Values computed from the number of tokens, which on a shard is another.

A model may read the number of tokens to make shapes of it, such as ``[B, S, N, H]`` for a Reshape.
Used as anything else (a divisor, a position, a condition) it would give every rank a value of its
own. So each element that ``Shape`` gives is followed: which are fixed, which grow with the tokens
by a fixed factor, and which depend on them in another way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mdattn_mpi.onnx.model import attribute_of, import_onnx, operator
from mdattn_mpi.onnx.rules import ELEMENTWISE
from mdattn_mpi.onnx.tokens import Tokens

FIXED, LINEAR, OTHER = 0, 1, 2

SHAPE_INPUT = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}  # where a node takes a shape
_PICKS = "Cast Concat Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze"
PICKS = frozenset(_PICKS.split())


def follow(node: Any, tokens: Tokens) -> bool:
    """Note what a node computes from the number of tokens; return whether it does nothing else.

    Refuse it if it uses the number as anything but a shape.
    """
    kind = operator(node)
    place = tokens.place(node.input[0]) if node.input else None
    if kind in ("Shape", "Size") and place:
        sizes = np.full(len(tokens.shape(node.input[0]) or ()), FIXED)
        sizes[place.dim] = LINEAR
        cut = slice(attribute_of(node, "start", 0), attribute_of(node, "end"))
        if kind == "Size" or sizes[cut].any():
            tokens.counts[node.output[0]] = sizes[cut] if kind == "Shape" else np.array(LINEAR)
        return True
    counted = [number for number, name in enumerate(node.input) if name in tokens.counts]
    if kind in ("Shape", "Size"):
        return True  # of what has a fixed shape
    if not counted:
        return False
    if counted == [SHAPE_INPUT.get(kind)]:
        if (tokens.counts[node.input[counted[0]]] == OTHER).any():
            raise tokens.refuse(node, "takes a shape that depends on the tokens in an unknown way")
        return False
    picks = kind in PICKS and counted[-1] < _data_inputs(node)
    if kind == "Range" or (kind == "Slice" and not picks):
        raise tokens.refuse(
            node,
            "numbers the tokens, which every rank would do from 0",
            fix="make the positions an input of the model, cut like the tokens",
        )
    computes = picks or kind in ELEMENTWISE
    if not computes or any(tokens.place(name) for name in node.input if name):
        raise tokens.refuse(
            node, "uses the number of tokens as a value, and a rank would use that of its shard"
        )
    found = _picked(node, tokens) if picks else [_computed(node, tokens)]
    for name, kinds in zip(node.output, found, strict=True):
        if kinds.any():
            tokens.counts[name] = kinds
    return True


def _kinds(name: str, tokens: Tokens) -> Any:
    """Return the kind of each element of a tensor."""
    if name in tokens.counts:
        return tokens.counts[name]
    return np.full(tokens.shape(name) or (), FIXED)


def _data_inputs(node: Any) -> int:
    """Count the inputs that a node picks from; those behind say what."""
    return len(node.input) if operator(node) == "Concat" else 1


def _picked(node: Any, tokens: Tokens) -> list[Any]:
    """Do to the kinds what the node does to the values."""
    data = _data_inputs(node)
    given = {name: _kinds(name, tokens) for name in node.input[:data]}
    for name in filter(None, node.input[data:]):
        given[name] = tokens.constant(name)
        if given[name] is None:
            return [np.full(tokens.shape(out) or (), OTHER) for out in node.output]
    return [np.asarray(found).astype(int) for found in _evaluate(node, given, tokens.opsets)]


def _evaluate(node: Any, given: dict[str, Any], opsets: Any) -> list[Any]:
    onnx = import_onnx()
    from onnx.reference import ReferenceEvaluator

    make = onnx.helper
    inputs = [
        make.make_tensor_value_info(name, make.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    ]
    outputs = [make.make_empty_tensor_value_info(name) for name in node.output]
    graph = make.make_graph([node], "one", inputs, outputs)
    model = make.make_model(graph, opset_imports=opsets)
    return list(ReferenceEvaluator(model).run(None, given))


def _computed(node: Any, tokens: Tokens) -> Any:
    """Sums of what is linear are linear, and so are products of it with what is fixed."""
    kinds = [_kinds(name, tokens) for name in node.input if name]
    shape = tokens.shape(node.output[0]) or ()
    highest = max(int(each.max(initial=FIXED)) for each in kinds)
    linear = sum(bool(each.any()) for each in kinds)
    if operator(node) in ("Add", "Sub") or (operator(node) == "Mul" and linear == 1):
        return np.full(shape, highest)
    return np.full(shape, OTHER)
