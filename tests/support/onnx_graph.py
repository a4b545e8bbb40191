"""Small ONNX models, written in a few words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


def graph(
    nodes: Sequence[Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    opset: int = 23,
) -> Any:
    """Make a model; an input is its shape (float), or a shape and a type."""
    typed = {
        n: shape if isinstance(shape, tuple) else (shape, FLOAT) for n, shape in inputs.items()
    }
    values = [helper.make_tensor_value_info(n, kind, shape) for n, (shape, kind) in typed.items()]
    results = [helper.make_tensor_value_info(n, FLOAT, s) for n, s in outputs.items()]
    constants = [numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()]
    made = helper.make_graph(list(nodes), "g", values, results, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    name = attributes.pop("name", outputs[0])
    return helper.make_node(kind, list(inputs), list(outputs), name=name, **attributes)


def branch(
    nodes: Sequence[Any], output: str, shape: Any = None, weights: Mapping[str, Any] | None = None
) -> Any:
    """Make a graph for a node to hold: no inputs, one output."""
    constants = [numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()]
    value = helper.make_tensor_value_info(output, FLOAT, shape)
    return helper.make_graph(list(nodes), output, [], [value], constants)
