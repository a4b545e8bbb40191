"""Which dims of a model's inputs count tokens, and of which sequence.

The attentions say it: the last dim but one of what they take counts tokens. Symbols are carried
there by shape inference; a symbol that arrives is one that counts tokens. A model without symbols
is given some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import graph_inputs, import_onnx, operator

SMALL = 64  # initializers up to so many elements may be shapes

Labels = dict[str, list[str | int]]  # of every dim of every input: a symbol, or its length


class Place(NamedTuple):
    """The dim of a tensor that counts tokens, and the sequence whose tokens they are."""

    sequence: str
    dim: int


def token_places(
    model: Any, attentions: Sequence[Any], named: Mapping[str, int]
) -> dict[str, list[Place]]:
    """Find the dims that count tokens in each input: as named, or as the attentions tell.

    Parameters
    ----------
    model
        The model.
    attentions
        Its attention nodes.
    named
        What the user said: dims by input. Others with the same symbol go with them.

    Raises
    ------
    RejectedError
        A name that is no input, a dim that it hasn't, or nothing to tell tokens by.

    """
    labels = {value.name: _labels(value) for value in graph_inputs(model)}
    if named:
        found = _named(labels, named)
        arriving = _arriving(model, labels, attentions)
        found = {symbol: found.get(arriving.get(symbol, ""), to) for symbol, to in found.items()}
    else:
        labels, found = _found(model, labels, attentions)
    if not found:
        raise RejectedError(
            "which dim counts tokens? "
            + "; ".join(f"{n} has {_show(d)}" for n, d in labels.items()),
            fix="name it for every input that has one: --shard INPUT:DIM",
        )
    return {
        name: [Place(found[label], dim) for dim, label in enumerate(dims) if label in found]
        for name, dims in labels.items()
    }


def _labels(value: Any) -> list[str | int]:
    """Return the dims of an input: symbols (one of its own where there is none), or lengths."""
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_dim{number}"
        for number, dim in enumerate(value.type.tensor_type.shape.dim)
    ]


def _show(dims: Sequence[str | int]) -> str:
    return f"[{', '.join(map(str, dims))}]"


def _named(labels: Labels, named: Mapping[str, int]) -> dict[str | int, str]:
    """Give every named dim a symbol; return the sequences of the symbols that are named."""
    found: dict[str | int, str] = {}
    for name, axis in named.items():
        dims = labels.get(name, [])
        if not -len(dims) <= axis < len(dims):
            known = ", ".join(f"{known} with {len(dims)} dims" for known, dims in labels.items())
            raise RejectedError(f"no dim {axis} of an input {name!r}", fix=f"there are {known}")
        if isinstance(dims[axis], int):
            dims[axis] = f"{dims[axis]}_tokens"
        nameless = dims[axis] == f"{name}_dim{axis % len(dims)}"
        found[dims[axis]] = "tokens" if nameless else str(dims[axis])
    return found


def _found(
    model: Any, labels: Labels, attentions: Sequence[Any]
) -> tuple[Labels, dict[str | int, str]]:
    """Follow symbols to the attentions: the model's own; else one a length; else one a dim."""
    by_length: Labels = {
        name: [f"{dim}_tokens" if isinstance(dim, int) else dim for dim in dims]
        for name, dims in labels.items()
    }
    by_dim: Labels = {
        name: [f"{name}_dim{n}" if isinstance(dim, int) else dim for n, dim in enumerate(dims)]
        for name, dims in labels.items()
    }
    for tried in (labels, by_length, by_dim):
        found = _arriving(model, tried, attentions)
        if found and all(sum(d in found for d in dims) < 2 for dims in tried.values()):
            return tried, found
    symbols = {dim for dims in labels.values() for dim in dims if isinstance(dim, str)}
    return labels, {symbol: symbol for symbol in symbols if len(symbols) == 1}


def _arriving(model: Any, labels: Labels, attentions: Sequence[Any]) -> dict[str | int, str]:
    """Return the sequence of each symbol that counts the tokens of an attention."""
    onnx = import_onnx()
    traced = skeleton(model)
    for value in traced.graph.input:
        dims = value.type.tensor_type.shape.dim
        for label, dim in zip(labels.get(value.name, ()), dims, strict=False):
            if isinstance(label, str):
                dim.dim_param = label
    del traced.graph.value_info[:]
    for value in traced.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(traced, data_prop=True).graph
    shapes = {value.name: _labels(value) for value in (*graph.value_info, *graph.input)}
    known = {label for dims in labels.values() for label in dims if isinstance(label, str)}

    def symbol_of(tensor: str) -> str | int | None:
        dims = shapes.get(tensor, [])
        return dims[-2] if len(dims) > 2 and dims[-2] in known else None

    found: dict[str | int, str] = {}
    for node in attentions:
        query, key, value = (symbol_of(tensor) for tensor in node.input[:3])
        for symbol, like in ((query, query), (key, key), (value, key or value)):
            if symbol is not None:  # keys and values are of one sequence
                found.setdefault(symbol, found.get(like or symbol, str(like)))
    return found


def skeleton(model: Any) -> Any:
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
