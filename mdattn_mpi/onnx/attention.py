"""The attentions of a model, in the words of our own: problems, and arrays that are token-major."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.masks import window_of
from mdattn_mpi.onnx.model import ATTENTION, attribute_of, import_onnx, name_of, operator
from mdattn_mpi.onnx.shard import Prepared
from mdattn_mpi.problem import AttentionProblem, DTypeName


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

    def token_major(self, array: Any, number: int, tokens: int) -> Any:
        """``[S, N, H]`` of the input of that number, for the first `tokens`."""
        if self.joined:
            heads, dim = self.heads[number > 0], self.dims[number > 1]
            split = array[0, :tokens].reshape(tokens, heads, dim)
        else:
            split = array[0, :, :tokens].swapaxes(0, 1)
        return np.ascontiguousarray(split)

    def as_it_was(self, output: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """Turn ``[S, N, Hv]`` into what the node gives for a query of that shape and dtype."""
        rows = shape[1] if self.joined else shape[2]
        if len(output) < rows:  # a rank without tokens: one of no meaning
            output = np.zeros((rows, *output.shape[1:]), output.dtype)
        wide = output.astype(dtype, copy=False)
        if self.joined:
            return np.ascontiguousarray(wide.reshape(1, rows, -1))
        return np.ascontiguousarray(wide.swapaxes(0, 1)[None])


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
