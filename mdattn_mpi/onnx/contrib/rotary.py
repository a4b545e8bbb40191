"""Rotary embeddings of ONNX Runtime's: by tables of cosines and sines, and positions."""

from __future__ import annotations

from mdattn_mpi.onnx.contrib.call import Call
from mdattn_mpi.onnx.contrib.layers import numbers


def rotary(call: Call) -> None:
    """RotaryEmbedding, of ``[B, S, N·H]`` or ``[B, N, S, H]``."""
    nodes, data = call.nodes, call.get("input")
    if call.attribute("is_packed_batching", 0) or call.attribute("scale", 1.0) != 1.0:
        raise call.refuse("has a scale, or packs its batch")
    shape = call.shape(data)
    if len(shape) == 4:
        rotated(call, data, shape[3], bool(call.attribute("interleaved", 0)), call.output())
        return
    heads = call.attribute("num_heads", 0)
    dim = shape[2] // heads if heads else 2 * call.shape(call.get("cos_cache"))[1]
    split = nodes.add("Transpose", nodes.reshape(data, 0, 0, -1, dim), perm=[0, 2, 1, 3])
    turned = rotated(call, split, dim, bool(call.attribute("interleaved", 0)))
    back = nodes.add("Transpose", turned, perm=[0, 2, 1, 3])
    nodes.reshape(back, 0, 0, -1, output=call.output())


def rotated(call: Call, data: str, dim: int, interleaved: bool, output: str = "") -> str:
    """Turn ``[B, N, S, H]``, of head dim `dim`, by the node's tables; what they don't reach stays.

    Pairs are the two halves of what is turned, or, `interleaved`, neighbours.
    """
    nodes = call.nodes
    half = call.shape(call.get("cos_cache"))[1]
    rest = ""
    if 2 * half < dim:
        data, rest = nodes.split(data, [2 * half, dim - 2 * half])
    if interleaved:
        pairs = nodes.reshape(data, 0, 0, 0, half, 2)
        first, second = (
            nodes.add("Squeeze", part, nodes.integers(-1)) for part in nodes.split(pairs, [1, 1])
        )
    else:
        first, second = nodes.split(data, [half, half])
    cosine, sine = (_angles(call, name, data) for name in ("cos_cache", "sin_cache"))
    products = [nodes.add("Mul", *pair) for pair in ((first, cosine), (second, sine))]
    real = nodes.add("Sub", *products)
    products = [nodes.add("Mul", *pair) for pair in ((second, cosine), (first, sine))]
    imaginary = nodes.add("Add", *products)
    end = "" if rest else output
    if interleaved:
        parts = [nodes.add("Unsqueeze", each, nodes.integers(-1)) for each in (real, imaginary)]
        turned = nodes.reshape(nodes.add("Concat", *parts, axis=-1), 0, 0, 0, -1, output=end)
    else:
        turned = nodes.add("Concat", real, imaginary, output=end, axis=-1)
    return nodes.add("Concat", turned, rest, output=output, axis=-1) if rest else turned


def _angles(call: Call, table: str, data: str) -> str:
    """Look up one row a token, ``[B, 1, S, half]``."""
    nodes, positions = call.nodes, call.get("position_ids")
    if not positions:
        positions = nodes.add("Unsqueeze", numbers(call, data, 2), nodes.integers(0))
    elif len(call.shape(positions)) == 1:  # the first of them
        first = nodes.reshape(positions, 1, 1)
        positions = nodes.add("Add", numbers(call, data, 2), first)
    rows = nodes.add("Gather", call.get(table), positions, axis=0)
    return nodes.add("Unsqueeze", rows, nodes.integers(1))
