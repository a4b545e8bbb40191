"""Shapes of all tensors of a model, by ONNX's own inference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import graph_inputs, import_onnx, operator

SMALL = 64  # initializers up to so many elements may be shapes

Labels = dict[str, list[str | int]]  # of every dim of every input: a symbol, or its length


def labels_of(value: Any) -> list[str | int]:
    """Return the dims of an input: symbols (one of its own where there is none), or lengths."""
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_dim{number}"
        for number, dim in enumerate(value.type.tensor_type.shape.dim)
    ]


def infer_shapes(
    model: Any, dims: Mapping[str, Sequence[str | int]], *, strict: bool = False
) -> Any:
    """Return the graph of a model with shapes, given the dims of its inputs.

    Raises
    ------
    RejectedError
        Nodes don't fit together, naming the first that doesn't; all of them must when `strict`.

    """
    traced = _skeleton(model)
    for value in traced.graph.input:
        for dim, size in zip(
            value.type.tensor_type.shape.dim, dims.get(value.name, ()), strict=False
        ):
            if isinstance(size, str):
                dim.dim_param = size
            else:
                dim.dim_value = size
    for value in traced.graph.output:
        value.type.tensor_type.ClearField("shape")
    infer = import_onnx().shape_inference.infer_shapes
    try:
        return infer(traced, strict_mode=strict, data_prop=True).graph
    except Exception as error:
        text = str(error)
    stops = re.findall(r"\(op_type:(\w+), node name: (.*?)\): (?:\[\w+\] )?(.*)", text)
    first = [stop for stop in stops if "instead is null" not in stop[2]]
    if strict and stops and not first:
        return infer_shapes(model, dims)  # only for want of what an unknown operator makes
    kind, name, why = first[0] if first else ("", "", " ".join(text.split()))
    named = f"node {name!r} ({kind})" if name else f"a node {kind}" if kind else "the model"
    raise RejectedError(
        f"{named} doesn't take every number of tokens: {why}",
        fix="export the model with a dynamic number of tokens; or name the dim of every input that "
        "counts them: --shard INPUT:DIM",
    )


def _skeleton(model: Any) -> Any:
    """Copy the model without its weights, and with operators that shape inference knows."""
    onnx = import_onnx()
    copy = onnx.ModelProto()
    copy.ir_version = model.ir_version
    copy.opset_import.extend(model.opset_import)
    graph = copy.graph
    graph.name = "skeleton"
    graph.input.extend(graph_inputs(model))
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            shape = list(tensor.dims)
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
            )
    graph.node.extend(_known_operators(model.graph.node))
    return copy


def _known_operators(nodes: Iterable[Any]) -> list[Any]:
    """Put operators that shape inference knows in the place of TensorRT's own."""
    make = import_onnx().helper.make_node
    return [
        make("Einsum", [node.input[0], node.input[2]], node.output[:1], equation="abcd,efgh->abch")
        if operator(node) == "TRT_Attention"
        else node
        for node in nodes
    ]
