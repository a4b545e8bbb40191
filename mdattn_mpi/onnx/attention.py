"""The attentions of a model, in the words of our own: problems, and token-major tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.graph import set_nodes
from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.masks import window_of
from mdattn_mpi.onnx.model import ATTENTION, attribute_of, import_onnx, name_of, operator
from mdattn_mpi.onnx.shard import Prepared
from mdattn_mpi.problem import AttentionProblem, DTypeName

ROWS = "_mdattn_rows"  # ends the name of what an attention gives that is laid out


@dataclass(frozen=True)
class AttentionNode:
    """What an attention computes, whatever the sequence.

    `dtype` is float16 where the model is in float32, whose arrays a CPU takes as they are.
    `joined` are inputs ``[1, S, N·H]``, others are ``[1, N, S, H]``.
    """

    heads: tuple[int, int]  # of queries; of keys and values
    dims: tuple[int, int]  # of queries and keys; of values
    dtype: DTypeName
    joined: bool
    causal: bool
    window: tuple[int, int]  # keys before and after, -1 for all
    scale: float
    softcap: float

    def over(self, tokens: int) -> AttentionProblem:
        """Say what it computes over a sequence."""
        return AttentionProblem(
            tokens,
            tokens,
            *self.heads,
            *self.dims,
            self.dtype,
            "upper_left" if self.causal else "none",
            self.scale,
            window=self.window,
            softcap=self.softcap,
        )


def attention_nodes(prepared: Prepared, shapes: Lengths) -> Mapping[str, AttentionNode]:
    """Describe the attentions of a model, by what they give.

    Raises
    ------
    RejectedError
        One that isn't from all of a sequence to all of it.

    """
    return {
        node.output[0]: _described(node, prepared, shapes)
        for node in prepared.model.graph.node
        if operator(node) in ATTENTION
    }


def lay_out(model: Any, nodes: Mapping[str, AttentionNode], types: dict[str, int]) -> None:
    """Have the attentions of a model take and give ``[S, N, H]``, in place.

    So whatever runs the rest of the model turns axes, where its tensors are, and an exporter's own
    Transpose before an attention meets its opposite. `nodes` describe the attentions by what they
    give, to whose name `ROWS` is added; the types of new tensors are added to `types`. They aren't
    ONNX's operator any more.
    """
    found: list[Any] = []
    for node in model.graph.node:
        known = nodes.get(node.output[0])
        if known is None:
            found.append(node)
        else:
            found += _laid_out(model, node, known, types)
    set_nodes(model.graph, found)


def _laid_out(model: Any, node: Any, known: AttentionNode, types: dict[str, int]) -> list[Any]:
    before: list[Any] = []
    after: list[Any] = []
    out, kind = node.output[0], types[node.input[0]]
    heads = (known.heads[0], known.heads[1], known.heads[1])
    for number, (count, dim) in enumerate(zip(heads, (known.dims[0], *known.dims), strict=True)):
        name, turned = node.input[number], f"{out}{ROWS}{number}"
        if not known.joined:
            before.append(_turn(name, f"{turned}_turned"))
            name = f"{turned}_turned"
        before.append(_reshape(model, name, turned, (-1, count, dim)))
        node.input[number] = turned
    node.output[0] = f"{out}{ROWS}"
    if known.joined:
        after.append(_reshape(model, node.output[0], out, (1, -1, heads[0] * known.dims[1])))
    else:
        shape = (1, -1, heads[0], known.dims[1])
        after.append(_reshape(model, node.output[0], f"{out}_turned", shape))
        after.append(_turn(f"{out}_turned", out))
    types.update({name: kind for each in (*before, node, *after) for name in each.output})
    return [*before, node, *after]


def _turn(name: str, output: str) -> Any:
    """``[1, N, S, H]`` to ``[1, S, N, H]``, or back."""
    return import_onnx().helper.make_node("Transpose", [name], [output], perm=[0, 2, 1, 3])


def _reshape(model: Any, name: str, output: str, shape: tuple[int, ...]) -> Any:
    onnx, dims = import_onnx(), f"{output}_shape"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), dims))
    return onnx.helper.make_node("Reshape", [name, dims], [output])


def _described(node: Any, prepared: Prepared, shapes: Lengths) -> AttentionNode:
    places = [prepared.tokens.place(name) for name in node.input[:3]]
    sequences = {place.sequence if place and place.dim else None for place in places}
    if len(sequences) > 1 or None in sequences or len(node.input) > 3:
        raise RejectedError(
            f"{name_of(node)} isn't from all of a sequence to all of it",
            fix="shard it for TensorRT: mdattn shard",
        )
    query, _, value = (shapes.shapes[name] for name in node.input[:3])
    joined = len(query) == 3
    heads = tuple(
        int(attribute_of(node, kind, 0)) if joined else shapes.shapes[node.input[number]][1]
        for number, kind in enumerate(("q_num_heads", "kv_num_heads"))
    )
    dim, v_dim = (query[2] // heads[0], value[2] // heads[1]) if joined else (query[3], value[3])
    causal = attribute_of(node, "is_causal", 0) or attribute_of(node, "causal_kind", b"none")
    plain = 1.0 if operator(node) == "TRT_Attention" else 1 / sqrt(dim)
    narrow = shapes.types[node.input[0]] == import_onnx().TensorProto.BFLOAT16
    return AttentionNode(
        (heads[0], heads[1]),
        (dim, v_dim),
        "bfloat16" if narrow else "float16",
        joined,
        causal not in (0, b"none"),
        window_of(node) or (-1, -1),
        float(attribute_of(node, "scale", plain)),
        float(attribute_of(node, "softcap", 0.0)),
    )
