"""ONNX Runtime's attentions, written out as TensorRT's, which has heads in a dim of their own."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.onnx.contrib.call import Call
from mdattn_mpi.onnx.contrib.layers import numbers
from mdattn_mpi.onnx.contrib.rotary import rotated
from mdattn_mpi.onnx.model import INNER_HEADS, WINDOW, import_onnx

CACHE = {
    "past": "past keys and values",
    "past_key": "past keys",
    "past_value": "past values",
    "past_sequence_length": "past keys",
    "cache_indirection": "past keys of several beams",
}
OTHERS = {
    "head_sink": "sinks",
    "k_scale": "quantized keys",
    "v_scale": "quantized values",
    "q_norm_weight": "norms of its queries",
    "k_norm_weight": "norms of its keys",
    "query_seqlens": "queries that are filled up",
}
PRESENT = {1: "keys for a cache", 2: "values for a cache", 3: "its scores"}


class Operands(NamedTuple):
    """Queries, keys and values ``[B, N, S, H]``, and the head dim of queries."""

    dim: int
    query: str
    key: str
    value: str


def multi_head(call: Call) -> None:
    """MultiHeadAttention: each of the three joined, packed together, or keys split already."""
    _refuse_cache(call)
    heads = call.attribute("num_heads")
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    shape = call.shape(query)
    if call.get("bias") and (not value or len(call.shape(key)) == 4):
        raise call.refuse("has a bias for keys that are packed or split")
    if not key:  # [B, S, N, 3, H]
        operands = Operands(shape[4], *_unpacked(call, query, 3))
    else:
        dim = shape[2] // heads
        if not value:  # [B, T, N, 2, H]
            operands = Operands(dim, _split_heads(call, query, heads), *_unpacked(call, key, 2))
        elif len(call.shape(key)) == 4:
            operands = Operands(dim, _split_heads(call, query, heads), key, value)
        else:
            joined = _biased(call, (query, key, value))
            operands = Operands(dim, *(_split_heads(call, each, heads) for each in joined))
    _attend(call, operands, _mask(call, operands.key, call.get("key_padding_mask")))


def merged(call: Call) -> None:
    """Attention: one product makes queries, keys and values."""
    _refuse_cache(call)
    if call.attribute("do_rotary", 0):
        raise call.refuse("turns queries and keys by angles of its own")
    width = call.shape(call.get("weights"))[1]
    sizes = call.attribute("qkv_hidden_sizes") or [width // 3] * 3
    product = call.nodes.add("MatMul", call.get("input"), call.get("weights"))
    if bias := call.get("bias"):
        product = call.nodes.add("Add", product, bias)
    heads = call.attribute("num_heads")
    parts = [_split_heads(call, part, heads) for part in call.nodes.split(product, sizes)]
    operands = Operands(sizes[0] // heads, *parts)
    _attend(call, operands, _mask(call, operands.key, call.get("mask_index")))


def grouped(call: Call) -> None:
    """GroupQueryAttention over a prompt: causal, perhaps with rotations and a window."""
    past = call.get("past_key")
    if not past or call.shape(past)[2]:  # one of no keys may be there
        _refuse_cache(call)
    call.refuse_outputs(PRESENT)
    call.refuse_inputs(OTHERS)
    for name, what in (("softcap", "a softcap"), ("smooth_softmax", "a smooth softmax")):
        if call.attribute(name, 0) > 0:
            raise call.refuse(f"has {what}, which TensorRT's attention hasn't")
    heads, kv_heads = call.attribute("num_heads"), call.attribute("kv_num_heads")
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    width = call.shape(query)[2]
    dim = width // heads if key else width // (heads + 2 * kv_heads)
    if not key:
        query, key, value = call.nodes.split(query, [n * dim for n in (heads, kv_heads, kv_heads)])
    query, key, value = (
        _split_heads(call, name, count)
        for name, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    if call.attribute("do_rotary", 0):
        interleaved = bool(call.attribute("rotary_interleaved", 0))
        query, key = (rotated(call, name, dim, interleaved) for name in (query, key))
    last = call.nodes.add("Cast", call.get("seqlens_k"), to=import_onnx().TensorProto.INT64)
    counts = call.nodes.add("Add", last, call.nodes.integers(1))
    seen = _within(call, key, counts)
    _attend(
        call,
        Operands(dim, query, key, value),
        _with_bias(call, seen),
        bool(call.attribute("causal", 1)),
        call.attribute("local_window_size", -1),
    )


def _refuse_cache(call: Call) -> None:
    call.refuse_inputs(CACHE)
    call.refuse_outputs(PRESENT)


def _split_heads(call: Call, name: str, heads: int) -> str:
    """``[B, S, N·H]`` to ``[B, N, S, H]``."""
    return call.nodes.add("Transpose", call.nodes.reshape(name, 0, 0, heads, -1), perm=[0, 2, 1, 3])


def _unpacked(call: Call, name: str, count: int) -> list[str]:
    """``[B, S, N, count, H]`` to `count` tensors ``[B, N, S, H]``."""
    nodes = call.nodes
    parts = [nodes.add("Gather", name, nodes.constant(np.int64(n)), axis=3) for n in range(count)]
    return [nodes.add("Transpose", part, perm=[0, 2, 1, 3]) for part in parts]


def _biased(call: Call, names: Sequence[str]) -> Sequence[str]:
    """Add to queries, keys and values their part of the bias."""
    if not call.get("bias"):
        return names
    sizes = [call.shape(name)[2] for name in names]
    parts = call.nodes.split(call.get("bias"), sizes)
    return [call.nodes.add("Add", *pair) for pair in zip(names, parts, strict=True)]


def _mask(call: Call, key: str, given: str) -> str:
    """Write which keys are seen, ``[B, 1, 1 or S, T]``; empty where nothing says it."""
    nodes, seen = call.nodes, ""
    if given:
        shape = call.shape(given)
        if len(shape) == 1 and shape[0] == call.shape(call.node.input[0])[0]:
            counts = nodes.add("Cast", given, to=import_onnx().TensorProto.INT64)
            seen = _within(call, key, counts)
        elif len(shape) in (2, 3):
            flags = nodes.add("Cast", given, to=import_onnx().TensorProto.BOOL)
            seen = nodes.add("Unsqueeze", flags, nodes.integers(*range(1, 5 - len(shape))))
        else:
            raise call.refuse(f"has a mask of {len(shape)} dims in a form that isn't known")
    return _with_bias(call, seen)


def _within(call: Call, key: str, counts: str) -> str:
    """Let as many keys be seen as there are, ``[B, 1, 1, T]``."""
    rows = call.nodes.reshape(counts, -1, 1, 1, 1)
    return call.nodes.add("Less", numbers(call, key, 2), rows)


def _with_bias(call: Call, seen: str) -> str:
    """Join a mask and what is added to the scores."""
    bias = call.get("attention_bias")
    if not bias or not seen:
        return bias or seen
    kind = import_onnx().helper.tensor_dtype_to_np_dtype(call.shapes.types[bias])
    lowest = call.nodes.constant(np.array(np.finfo(kind).min, kind))
    return call.nodes.add("Where", seen, bias, lowest)


def _attend(
    call: Call, operands: Operands, mask: str, causal: bool | None = None, window: int = -1
) -> None:
    """Write the attention, and join its heads."""
    nodes, output = call.nodes, call.output()
    query = nodes.scaled(operands.query, call.attribute("scale", 0.0) or 1 / sqrt(operands.dim))
    attributes: dict[str, Any] = {}
    if window > 0:
        attributes[WINDOW] = [window - 1, 0]  # a query's own key is one of them
    elif call.attribute("unidirectional", 0) if causal is None else causal:
        attributes["causal_kind"] = "upper_left"
    given = [query, operands.key, operands.value, *filter(None, [mask])]
    heads = nodes.add("TRT_Attention", *given, output=f"{output}{INNER_HEADS}", **attributes)
    nodes.reshape(nodes.add("Transpose", heads, perm=[0, 2, 1, 3]), 0, 0, -1, output=output)
