"""Execute a TensorRT network in ONNX Runtime, one rank a thread.

Every layer of an attention network becomes operators of ONNX, attention the ones that define it.
What travels between ranks cuts the model into segments, as in any sharded model. With
`network_interpreter` this shares how a layer is read, and nothing of what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.model import attribute_of
from mdattn_mpi.onnx.nodes import Nodes
from mdattn_mpi.onnx.segments import Segments
from tests.support.network_interpreter import (
    Arrays,
    Collectives,
    Ranks,
    constant_values,
    exchange,
    typed_layer,
)

OPSET = 23
INTEGERS = {"INT32": TensorProto.INT32, "INT64": TensorProto.INT64}
FLOATS = {
    "FLOAT": TensorProto.FLOAT,
    "HALF": TensorProto.FLOAT16,
    # ONNX Runtime's CPUs don't compute in it: float32, rounded wherever the network makes one.
    "BF16": TensorProto.FLOAT,
}


class NetworkInOnnxRuntime:
    """A network as a model, loaded once for all ranks.

    Parameters
    ----------
    api, network, collectives
        See `network_interpreter.interpret`.
    inputs
        Those of one rank: their shapes are as good as any other's.

    """

    def __init__(self, api: Any, network: Any, collectives: Collectives, inputs: Arrays) -> None:
        self._nodes = Nodes("network")
        self._collectives = collectives
        given = [network.get_input(number) for number in range(network.num_inputs)]
        self._kinds = {each.name: _kind(each) for each in given}
        for number in range(network.num_layers):
            self._write(typed_layer(api, network.get_layer(number)))
        values = [
            helper.make_tensor_value_info(
                each.name, _kind(each), [None if dim < 0 else dim for dim in each.shape]
            )
            for each in given
        ]
        results = [network.get_output(number) for number in range(network.num_outputs)]
        outputs = [helper.make_tensor_value_info(each.name, _kind(each), None) for each in results]
        graph = helper.make_graph(self._nodes.made, "g", values, outputs, self._nodes.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        dims = {name: np.shape(inputs[name]) for name in self._kinds}
        self._segments = Segments(model, Lengths(model, dims).types, threads=1)

    def run(self, inputs: Arrays, ranks: Ranks) -> Arrays:
        """Execute it on this rank; return its outputs by name, bfloat16 as float32.

        All ranks call this.
        """
        dtypes = {n: helper.tensor_dtype_to_np_dtype(kind) for n, kind in self._kinds.items()}
        run = self._segments.run({n: inputs[n].astype(dtype) for n, dtype in dtypes.items()})
        answer = None
        try:
            while True:
                node, (array, *_) = run.send(answer)
                operation = attribute_of(node, "collective_operation").decode().upper()
                answer = exchange(ranks, array, operation)
        except StopIteration as end:
            outputs: Arrays = end.value
        return outputs

    def _write(self, layer: Any) -> None:
        """Add the nodes of a layer, the last of which makes its output."""
        inputs = [layer.get_input(number) for number in range(layer.num_inputs)]
        names = ["" if each is None else each.name for each in inputs]
        output = layer.get_output(0)
        found = WRITERS[layer.type.name](self, layer, *names)
        if output.dtype.name == "BF16":
            found = self.add("Cast", found, to=TensorProto.BFLOAT16)
            self.add("Cast", found, output=output.name, to=TensorProto.FLOAT)
        else:
            self.add("Identity", found, output=output.name)

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output; return its name."""
        return self._nodes.add(kind, *inputs, **attributes)

    def constant(self, layer: Any) -> str:
        """Write down the values of a constant layer."""
        kind = helper.tensor_dtype_to_np_dtype(_kind(layer.get_output(0)))
        return self._nodes.constant(constant_values(layer, kind))

    def shuffle(self, layer: Any, data: str, shape: str = "") -> str:
        """Transpose, reshape, transpose."""
        dims = len(layer.get_input(0).shape)
        data = self.add("Transpose", data, perm=list(layer.first_transpose)[:dims])
        if not shape:
            shape = self._nodes.integers(*layer.reshape_dims)
        data = self.add("Reshape", data, shape, allowzero=int(not layer.zero_is_placeholder))
        dims = len(layer.get_output(0).shape)
        return self.add("Transpose", data, perm=list(layer.second_transpose)[:dims])

    def slice(self, layer: Any, data: str, start: str = "", size: str = "", *rest: str) -> str:
        """Cut `size` elements from `start` on, of every dim."""
        assert layer.mode.name == "STRICT_BOUNDS"
        assert not any(rest)
        assert set(layer.stride) == {1}
        start = start or self._nodes.integers(*layer.start)
        end = self.add("Add", start, size or self._nodes.integers(*layer.shape))
        return self.add("Slice", data, start, end)

    def elementwise(self, layer: Any, first: str, second: str) -> str:
        """Combine two tensors, element by element."""
        return self.add({"PROD": "Mul", "SUM": "Add"}[layer.op.name], first, second)

    def gather(self, layer: Any, data: str, indices: str) -> str:
        """Take some places of one dim."""
        assert layer.mode.name == "DEFAULT"
        assert layer.num_elementwise_dims == 0
        return self.add("Gather", data, indices, axis=layer.axis)

    def collective(self, layer: Any, data: str) -> str:
        """Exchange between two segments."""
        return self._exchange(data, self._collectives[layer.name], layer.num_ranks)

    def _exchange(self, data: str, operation: str, ranks: int) -> str:
        kind = operation.lower()
        return self.add("DistCollective", data, collective_operation=kind, nb_rank=ranks)

    def attention(self, layer: Any, query: str, key: str, value: str) -> str:
        """Attend in float32; with ``num_ranks`` to the keys of all ranks, which are gathered."""
        of = layer.attention
        if of.num_ranks > 1:
            key, value = (self._gathered(each, of.num_ranks) for each in (key, value))
        heads, kv_heads = (layer.get_input(number).shape[1] for number in (0, 1))
        repeated = self._nodes.integers(*(n * kv_heads // heads for n in range(heads)))
        key, value = (self.add("Gather", each, repeated, axis=1) for each in (key, value))
        query, key, value = (self._nodes.wide(each) for each in (query, key, value))
        scores = self.add("MatMul", query, self.add("Transpose", key, perm=[0, 1, 3, 2]))
        if of.causal_kind.name != "NONE":
            scores = self._causal(scores, of.causal_kind.name == "LOWER_RIGHT")
        found = self.add("MatMul", self.add("Softmax", scores, axis=-1), value)
        return self.add("Cast", found, to=_kind(layer.get_output(0)))

    def _gathered(self, data: str, ranks: int) -> str:
        """``[1, N, L, H]`` of all ranks, one after the other along the tokens."""
        tokens_first = self.add("Transpose", data, perm=[2, 0, 1, 3])
        traded = self._exchange(tokens_first, "ALL_GATHER", ranks)
        return self.add("Transpose", traded, perm=[1, 2, 0, 3])

    def _causal(self, scores: str, lower_right: bool) -> str:
        """Block the keys above a diagonal, which begins in the upper left corner or ends below."""
        rows, columns = (self.add("Shape", scores, start=n, end=n + 1) for n in (2, 3))
        diagonal = self.add("Sub", columns, rows) if lower_right else self._nodes.integers(0)
        shape = self.add("Concat", rows, columns, axis=0)
        ones = self.add("Expand", self._nodes.constant(np.ones((1, 1), np.float32)), shape)
        lower = self.add("Trilu", ones, self.add("Squeeze", diagonal), upper=0)
        seen = self.add("Cast", lower, to=TensorProto.BOOL)
        return self.add("Where", seen, scores, self._nodes.constant(np.float32(-np.inf)))


Writer = Callable[..., str]
WRITERS: dict[str, Writer] = {
    "CONSTANT": NetworkInOnnxRuntime.constant,
    "SHUFFLE": NetworkInOnnxRuntime.shuffle,
    "SLICE": NetworkInOnnxRuntime.slice,
    "ELEMENTWISE": NetworkInOnnxRuntime.elementwise,
    "CAST": lambda self, layer, data: self.add("Cast", data, to=_kind(layer.get_output(0))),
    "CONCATENATION": lambda self, layer, *data: self.add("Concat", *data, axis=layer.axis),
    "GATHER": NetworkInOnnxRuntime.gather,
    "DIST_COLLECTIVE": NetworkInOnnxRuntime.collective,
    "ATTENTION_INPUT": NetworkInOnnxRuntime.attention,
    "ATTENTION_OUTPUT": lambda self, layer, data: data,
}


def _kind(tensor: Any) -> int:
    return {**INTEGERS, **FLOATS}[tensor.dtype.name]
