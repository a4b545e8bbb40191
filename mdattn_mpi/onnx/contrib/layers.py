"""Norms, activations, embeddings and products that ONNX Runtime's optimizer fuses."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np

from mdattn_mpi.onnx.contrib.call import Call
from mdattn_mpi.onnx.model import import_onnx


def layer_norm(call: Call, data: str, bias: str = "") -> None:
    """Normalize the last dim, with a shift and a scale."""
    given = [data, call.get("gamma"), bias]
    epsilon = call.attribute("epsilon", 1e-5)
    call.nodes.add(
        "LayerNormalization", *filter(None, given), output=call.output(), axis=-1, epsilon=epsilon
    )


def rms_norm(call: Call, data: str) -> None:
    """Divide by the root of the mean square over the last dim, in float32."""
    nodes = call.nodes
    wide = nodes.wide(data)
    mean = reduced(call, "ReduceMean", nodes.add("Mul", wide, wide), -1)
    epsilon = nodes.constant(np.float32(call.attribute("epsilon", 1e-5)))
    root = nodes.add("Sqrt", nodes.add("Add", mean, epsilon))
    plain = nodes.narrow(nodes.add("Div", wide, root), data)
    nodes.add("Mul", plain, call.get("gamma"), output=call.output())


def reduced(call: Call, kind: str, data: str, dim: int) -> str:
    """Reduce one dim, and keep it as 1."""
    if call.opset >= 18 or kind == "ReduceSum":
        return call.nodes.add(kind, data, call.nodes.integers(dim), keepdims=1)
    return call.nodes.add(kind, data, axes=[dim], keepdims=1)


def simplified_norm(call: Call) -> None:
    """SimplifiedLayerNormalization."""
    if call.attribute("axis", -1) not in (-1, len(call.shape(call.get("X"))) - 1):
        raise call.refuse("normalizes more than the last dim")
    rms_norm(call, call.get("X"))


def _skipped(call: Call) -> str:
    """Add up what is skipped and what isn't."""
    total = call.get("input")
    if bias := call.get("bias"):
        total = call.nodes.add("Add", total, bias)
    return call.nodes.add("Add", total, call.get("skip"), output=call.output(3))


def skip_norm(call: Call) -> None:
    """SkipLayerNormalization."""
    call.refuse_outputs({1: "its mean", 2: "its deviation"})
    layer_norm(call, _skipped(call), call.get("beta"))


def skip_simplified_norm(call: Call) -> None:
    """SkipSimplifiedLayerNormalization."""
    call.refuse_outputs({1: "its mean", 2: "its deviation"})
    rms_norm(call, _skipped(call))


def embed_norm(call: Call) -> None:
    """EmbedLayerNormalization: words, places and segments; and how many words there are."""
    nodes, words = call.nodes, call.get("input_ids")
    total = nodes.add("Gather", call.get("word_embedding"), words, axis=0)
    where = nodes.add(
        "Gather",
        call.get("position_embedding"),
        call.get("position_ids") or numbers(call, words, 1),
        axis=0,
    )
    segments = call.get("segment_ids")
    if segments:
        segment = nodes.add("Gather", call.get("segment_embedding"), segments, axis=0)
        total = nodes.add("Add", total, segment)
    total = nodes.add("Add", total, where, output=call.output(2))
    layer_norm(call, total, call.get("beta"))
    if call.output(1):
        if not call.get("mask"):
            raise call.refuse("counts words without a mask")
        count = reduced(call, "ReduceSum", call.get("mask"), 1)
        nodes.reshape(count, -1, output=call.output(1))


def numbers(call: Call, like: str, dim: int) -> str:
    """0, 1, … along a dim of a tensor."""
    nodes = call.nodes
    count = nodes.add("Gather", nodes.add("Shape", like), nodes.constant(np.int64(dim)), axis=0)
    zero, one = (nodes.constant(np.int64(number)) for number in (0, 1))
    return nodes.add("Range", zero, count, one)


def _biased(call: Call) -> str:
    data, bias = call.get("X"), call.get("bias")
    return call.nodes.add("Add", data, bias) if bias else data


def gelu(call: Call) -> None:
    """Gelu and BiasGelu: ``x/2 · (1 + erf(x/√2))``, in float32."""
    nodes, data = call.nodes, _biased(call)
    wide = nodes.wide(data)
    error = nodes.add("Erf", nodes.add("Mul", wide, nodes.constant(np.float32(1 / sqrt(2)))))
    _halved(call, data, wide, error)


def fast_gelu(call: Call) -> None:
    """FastGelu: ``x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))``, in float32."""
    nodes, data = call.nodes, _biased(call)
    wide = nodes.wide(data)
    cube = nodes.add("Mul", nodes.add("Mul", wide, wide), wide)
    small = nodes.add("Mul", cube, nodes.constant(np.float32(0.044715)))
    inner = nodes.add(
        "Mul", nodes.add("Add", wide, small), nodes.constant(np.float32(sqrt(2 / pi)))
    )
    _halved(call, data, wide, nodes.add("Tanh", inner))


def _halved(call: Call, data: str, wide: str, curve: str) -> None:
    nodes = call.nodes
    one, half = (nodes.constant(np.float32(number)) for number in (1, 0.5))
    product = nodes.add("Mul", nodes.add("Mul", wide, half), nodes.add("Add", curve, one))
    nodes.narrow(product, data, output=call.output())


def quick_gelu(call: Call) -> None:
    """QuickGelu: ``x · sigmoid(alpha · x)``."""
    nodes, data = call.nodes, _biased(call)
    wide = nodes.wide(data)
    alpha = nodes.constant(np.float32(call.attribute("alpha", 1.702)))
    gate = nodes.add("Sigmoid", nodes.add("Mul", wide, alpha))
    nodes.narrow(nodes.add("Mul", wide, gate), data, output=call.output())


def fused_product(call: Call) -> None:
    """FusedMatMul: operands that are transposed, and a factor."""
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise call.refuse("turns its batch")
    nodes = call.nodes
    operands = []
    for name in "AB":
        operand = call.get(name)
        if call.attribute(f"trans{name}", 0):
            dims = list(range(len(call.shape(operand))))
            operand = nodes.add("Transpose", operand, perm=[*dims[:-2], dims[-1], dims[-2]])
        operands.append(operand)
    factor = call.attribute("alpha", 1.0)
    if factor == 1.0:
        nodes.add("MatMul", *operands, output=call.output())
        return
    kind = import_onnx().helper.tensor_dtype_to_np_dtype(call.shapes.types[operands[0]])
    product = nodes.add("MatMul", *operands)
    nodes.add("Mul", product, nodes.constant(np.array(factor, kind)), output=call.output())
