"""What a model computes from lengths alone: shapes, positions, tables, masks.

The model is run without its weights and its data. A tensor that depends on nothing but constants
and on shapes has a value, of any other one the shape is inferred, node by node. So what an exporter
wrote in thirty nodes is known by what comes out of them.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from math import prod
from typing import Any

import numpy as np

from mdattn_mpi.onnx.model import (
    ATTENTION,
    RANDOM,
    RANK_COUNT,
    STANDARD,
    WINDOW,
    attribute_of,
    constant_of,
    import_onnx,
    operator,
    reads,
    subgraphs,
)

ANY = 37  # what symbols count where any number will do
LARGEST = 1 << 22  # elements of a constant that is looked into
WEIGHTS = 1 << 18  # elements of one of floats; larger ones are weights
SHAPE_LIKE = 1 << 10  # elements of a value that shape inference is told

Dims = Mapping[str, Sequence[int]]


class Lengths:
    """A model at given lengths.

    Attributes
    ----------
    values
        The tensors that depend on lengths alone.
    shapes, types
        Of all tensors, in ONNX's numbers; those that can't be known are left out.
    failures
        What shape inference said of the nodes whose outputs have no shape, by output.

    """

    def __init__(
        self,
        model: Any,
        dims: Dims,  # of every input
        given: Mapping[str, Any] | None = None,  # values of inputs, taken as constants
        positions: Any = None,  # in place of what a Range over as many numbers gives
        only: Iterable[Any] | None = None,  # the nodes, in order
        largest: int | None = None,  # elements of a value that is computed
    ) -> None:
        self.values: ChainMap[str, Any] = ChainMap()
        self.shapes: ChainMap[str, tuple[int, ...]] = ChainMap()
        self.types: ChainMap[str, int] = ChainMap()
        self.failures: dict[str, str] = {}
        self._branches: dict[tuple[str, str], Lengths] = {}
        self._opsets = list(model.opset_import)
        self._ir_version = model.ir_version
        self._positions = positions
        self._largest = largest
        self.take_constants(model.graph.initializer)
        for value in model.graph.input:
            if given and value.name in given:
                self._know(value.name, given[value.name])
            elif value.name not in self.shapes:
                kind = value.type.tensor_type.elem_type
                self._note(value.name, tuple(dims[value.name]), kind)
        for node in model.graph.node if only is None else only:
            self.run(node)

    def branch(self, node: Any, attribute: str) -> Lengths:
        """Return the same of a graph that a node holds."""
        return self._branches[node.output[0], attribute]

    def take_constants(self, tensors: Iterable[Any]) -> None:
        """Take initializers into account."""
        onnx = import_onnx()
        for tensor in tensors:
            outside = tensor.data_location == onnx.TensorProto.EXTERNAL
            whole = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
            if outside or prod(tensor.dims) > (LARGEST if whole else WEIGHTS):
                self._note(tensor.name, tuple(tensor.dims), tensor.data_type)
            else:
                self._know(tensor.name, onnx.numpy_helper.to_array(tensor))

    def _know(self, name: str, array: Any) -> None:
        array = np.asarray(array)
        self.values[name] = array
        kind = import_onnx().helper.np_dtype_to_tensor_dtype(array.dtype)
        self._note(name, array.shape, kind)

    def _note(self, name: str, shape: tuple[int, ...], kind: int) -> None:
        self.shapes[name], self.types[name] = shape, kind

    def run(self, node: Any) -> None:
        """Compute what a node gives, or infer the shapes of it."""
        if operator(node) == "If":
            return self._run_branches(node)
        if operator(node) == "Shape" and node.input[0] in self.shapes:
            found = [_shape_of(node, self.shapes[node.input[0]])]
        elif operator(node) == "Size" and node.input[0] in self.shapes:
            found = [np.array(prod(self.shapes[node.input[0]]), np.int64)]
        elif self._is_known(node):
            found = self._compute(node)
        else:
            return self._infer(node)
        for name, array in zip(node.output, found, strict=False):
            if name and isinstance(array, np.ndarray | np.generic):
                self._know(name, array)
        return None

    def _run_branches(self, node: Any) -> None:
        """Run both branches; what comes out is known where one is taken, or both agree."""
        for name, graph in subgraphs(node):
            inner = copy(self)
            inner.values, inner.shapes = self.values.new_child(), self.shapes.new_child()
            inner.types = self.types.new_child()
            inner.failures, inner._branches = {}, {}
            inner.take_constants(graph.initializer)
            for each in graph.node:
                inner.run(each)
            self._branches[node.output[0], name] = inner
        condition = self.values.get(node.input[0])
        graphs = dict(subgraphs(node))
        if condition is not None:
            taken = "then_branch" if np.all(condition) else "else_branch"
            graphs = {taken: graphs[taken]}
        for number, name in enumerate(node.output):
            ends = [
                (self.branch(node, key), graph.output[number].name) for key, graph in graphs.items()
            ]
            shapes = {inner.shapes.get(end) for inner, end in ends}
            inner, end = ends[0]
            if len(ends) == 1 and end in inner.values:
                self._know(name, inner.values[end])
            elif len(shapes) == 1 and end in inner.shapes:
                self._note(name, inner.shapes[end], inner.types[end])

    def _is_known(self, node: Any) -> bool:
        """Whether a node's outputs can be computed, and are small enough."""
        if operator(node) in RANDOM or subgraphs(node):
            return False
        if any(name not in self.values for name in reads(node)):
            return False
        if self._largest is None:
            return True
        self._infer(node)
        sizes = [prod(self.shapes[name]) for name in node.output if name in self.shapes]
        return all(size <= self._largest for size in sizes)

    def _compute(self, node: Any) -> list[Any]:
        if operator(node) == "Constant":
            graph = import_onnx().helper.make_graph([node], "one", [], [])
            value = constant_of(graph, node.output[0])
            return [] if value is None else [value]
        given = {name: self.values[name] for name in node.input if name}
        if operator(node) == "GatherElements":  # the reference (1.23) fails on long tables
            return [_gather_elements(node, *given.values())]
        try:
            found = evaluate_node(node, given, self._opsets)
        except Exception:  # whatever the reference can't do stays unknown
            self._infer(node)
            return []
        positions = self._positions
        if operator(node) == "Range" and positions is not None:
            found = [positions.astype(a.dtype) if len(a) == len(positions) else a for a in found]
        return found

    def _infer(self, node: Any) -> None:
        onnx = import_onnx()
        if operator(node) in ("TRT_Attention", "DistCollective") and node.input[0] in self.types:
            self.types[node.output[0]] = self.types[node.input[0]]
        if operator(node) == "TRT_Attention":
            query, value = (self.shapes.get(node.input[number]) for number in (0, 2))
            if query and value:
                self._note(node.output[0], (*query[:-1], value[-1]), self.types[node.input[0]])
            return
        if operator(node) == "DistCollective":
            if shape := self.shapes.get(node.input[0]):
                gathers = attribute_of(node, "collective_operation") == b"all_gather"
                ranks = attribute_of(node, RANK_COUNT) if gathers else 1
                self.shapes[node.output[0]] = (shape[0] * ranks, *shape[1:])
            return
        if operator(node) in ATTENTION:
            node = _without(node, (WINDOW, RANK_COUNT))
        domain = "" if node.domain in STANDARD else node.domain
        version = {each.domain: each.version for each in self._opsets}.get(node.domain, 1)
        types = {
            name: onnx.helper.make_tensor_type_proto(self.types[name], self.shapes.get(name))
            for name in reads(node)
            if name in self.types
        }
        data = {
            name: onnx.numpy_helper.from_array(self.values[name], name)
            for name in node.input
            if name in self.values and self.values[name].size <= SHAPE_LIKE
        }
        if not onnx.defs.has(node.op_type, domain):
            return
        try:
            schema = onnx.defs.get_schema(node.op_type, version, domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self._opsets, ir_version=self._ir_version
            )
        except Exception as error:  # an operator that isn't known, or inputs that aren't
            whole = all(name in self.shapes for name in reads(node))
            self.failures.update(dict.fromkeys(node.output, _reason(error) if whole else ""))
            return
        for name, made in found.items():
            tensor = made.tensor_type
            if made.HasField("tensor_type"):
                self.types[name] = tensor.elem_type
            dims = tensor.shape.dim
            if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
                self.shapes[name] = tuple(dim.dim_value for dim in dims)


def _without(node: Any, names: Sequence[str]) -> Any:
    """Copy a node without attributes that are ours or TensorRT's."""
    copied = import_onnx().NodeProto.FromString(node.SerializeToString())
    kept = [each for each in node.attribute if each.name not in names]
    del copied.attribute[:]
    copied.attribute.extend(kept)
    return copied


def _gather_elements(node: Any, data: Any, indices: Any) -> Any:
    axis = next((each.i for each in node.attribute if each.name == "axis"), 0) % data.ndim
    part = tuple(slice(None if n == axis else size) for n, size in enumerate(indices.shape))
    return np.take_along_axis(data[part], indices % data.shape[axis], axis)


def _reason(error: Exception) -> str:
    """Shorten what shape inference said."""
    return re.sub(r"^.*?(\[\w+\] )+", "", " ".join(str(error).split()))


def _shape_of(node: Any, shape: tuple[int, ...]) -> Any:
    cut = {each.name: each.i for each in node.attribute}
    return np.array(shape[cut.get("start", 0) : cut.get("end", len(shape))], np.int64)


def evaluate_node(node: Any, given: Mapping[str, Any], opsets: Sequence[Any]) -> list[Any]:
    """Run one node in onnx's reference evaluator."""
    onnx = import_onnx()
    from onnx.reference import ReferenceEvaluator

    make = onnx.helper
    inputs = [
        make.make_tensor_value_info(name, make.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    ]
    outputs = [make.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = make.make_graph([node], "one", inputs, outputs)
    model = make.make_model(graph, opset_imports=opsets)
    with np.errstate(all="ignore"):  # infinities are what masks are made of
        return list(ReferenceEvaluator(model).run(None, dict(given)))
