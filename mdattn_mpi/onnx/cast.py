"""Products and attentions of a float32 model in 16 bits, which is what TensorRT's attention takes.

Weights and tables are stored in 16 bits. Everything between (norms, residuals, activations) stays
in float32, as do the model's inputs and outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.axes import at_lengths
from mdattn_mpi.onnx.graph import prune, set_nodes
from mdattn_mpi.onnx.lengths import ANY, Lengths
from mdattn_mpi.onnx.model import ATTENTION, all_nodes, import_onnx, operator, subgraphs
from mdattn_mpi.problem import DTypeName

NARROW = frozenset(("MatMul", "Gemm", *ATTENTION))
PROBES = (1, ANY)  # what symbols count while types are looked up: a batch may be 1 already


def types_of(model: Any) -> dict[str, int]:
    """Return the element types of all tensors, as ONNX counts these."""
    return {
        name: kind
        for count in PROBES
        for name, kind in Lengths(model, at_lengths(model, {}, {}, (count,))).types.items()
    }


def has_float32_attention(model: Any) -> bool:
    """Whether an attention of the model computes in float32."""
    types, wide = types_of(model), import_onnx().TensorProto.FLOAT
    return any(
        types.get(node.input[0]) == wide for node in model.graph.node if operator(node) in ATTENTION
    )


def cast_products(model: Any, dtype: DTypeName) -> int:
    """Rewrite a model in place; return how many nodes are in 16 bits now.

    Raises
    ------
    RejectedError
        A weight that float16 can't hold.

    """
    return _Caster(model, dtype).run()


def widen(model: Any) -> None:
    """Turn everything that is in 16 bits into float32, in place; weights are in the model."""
    onnx = import_onnx()
    wide, narrow = onnx.TensorProto.FLOAT, (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)

    def widen_values(tensor: Any) -> None:
        if tensor.data_type in narrow:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    graphs = [model.graph, *(g for n in all_nodes(model.graph) for _, g in subgraphs(n))]
    for graph in graphs:
        for tensor in graph.initializer:
            widen_values(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in narrow:
                value.type.tensor_type.elem_type = wide
        for attribute in (each for node in graph.node for each in node.attribute):
            if attribute.name in ("to", "dtype") and attribute.i in narrow:
                attribute.i = wide
            if attribute.HasField("t"):
                widen_values(attribute.t)


class _Caster:
    def __init__(self, model: Any, dtype: DTypeName) -> None:
        self.onnx = import_onnx()
        kinds = self.onnx.TensorProto
        self.graph, self.types = model.graph, types_of(model)
        self.wide, self.dtype = kinds.FLOAT, dtype
        self.narrow = kinds.FLOAT16 if dtype == "float16" else kinds.BFLOAT16
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.cast: dict[str, str] = {}  # tensors, and the same in 16 bits

    def run(self) -> int:
        self._widen_bytes()
        nodes: list[Any] = []
        count = 0
        for node in self.graph.node:
            numbers = self._narrow_inputs(node)
            for number in numbers:
                node.input[number] = self._narrowed(node.input[number], nodes)
            nodes.append(node)
            if numbers:
                count += 1
                self._widen(node, nodes)
        set_nodes(self.graph, nodes)
        prune(self.graph)
        return count

    def _widen_bytes(self) -> None:
        """Store in 16 bits the weights of 8 that are cast as they are read, for TensorRT has none.

        Every one of 256 values is the same in float16 and bfloat16.
        """
        kinds = self.onnx.TensorProto
        readers: dict[str, set[str]] = {}
        for node in self.graph.node:
            for name in node.input:
                readers.setdefault(name, set()).add(operator(node))
        for name, tensor in self.weights.items():
            if tensor.data_type in (kinds.INT8, kinds.UINT8) and readers.get(name) == {"Cast"}:
                values = self.onnx.numpy_helper.to_array(tensor)
                kind = self.onnx.helper.tensor_dtype_to_np_dtype(self.narrow)
                tensor.CopyFrom(self.onnx.numpy_helper.from_array(values.astype(kind), name))

    def _narrow_inputs(self, node: Any) -> list[int]:
        """Return the inputs of a node that are to be in 16 bits."""
        table = operator(node) == "Gather" and node.input[0] in self.weights
        if operator(node) not in NARROW and not table:
            return []
        return [n for n, name in enumerate(node.input) if self.types.get(name) == self.wide]

    def _narrowed(self, name: str, nodes: list[Any]) -> str:
        if name not in self.cast:
            self.cast[name] = f"{name}_{self.dtype}"
            if name in self.weights:
                self.graph.initializer.append(self._narrow_weight(name))
            else:
                nodes.append(self._cast(name, self.cast[name], self.narrow))
        return self.cast[name]

    def _narrow_weight(self, name: str) -> Any:
        values = self.onnx.numpy_helper.to_array(self.weights[name])
        kind = self.onnx.helper.tensor_dtype_to_np_dtype(self.narrow)
        with np.errstate(over="ignore"):
            narrow = values.astype(kind)
        if np.isfinite(values).all() and not np.isfinite(narrow.astype(np.float32)).all():
            raise RejectedError(
                f"the weight {name!r} goes up to {np.abs(values).max():.3g}, beyond {self.dtype}",
                fix="use --dtype bf16",
            )
        return self.onnx.numpy_helper.from_array(narrow, self.cast[name])

    def _widen(self, node: Any, nodes: list[Any]) -> None:
        """Give the readers of a node what they had in float32, but those in 16 bits."""
        output = node.output[0]
        node.output[0] = self.cast[output] = f"{output}_{self.dtype}"
        nodes.append(self._cast(node.output[0], output, self.wide))

    def _cast(self, name: str, output: str, kind: int) -> Any:
        return self.onnx.helper.make_node("Cast", [name], [output], name=f"{output}_cast", to=kind)
