"""A model of ONNX Runtime's operators made one of ONNX's.

ONNX Runtime's optimizer fuses what an exporter wrote into operators of its own (domain
``com.microsoft``). What each computes is said in its ``docs/ContribOperators.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mdattn_mpi.onnx.axes import at_lengths
from mdattn_mpi.onnx.contrib import attention, layers
from mdattn_mpi.onnx.contrib.call import Call
from mdattn_mpi.onnx.contrib.rotary import rotary
from mdattn_mpi.onnx.graph import prune, set_nodes
from mdattn_mpi.onnx.lengths import ANY, Lengths
from mdattn_mpi.onnx.model import STANDARD, operator, reads
from mdattn_mpi.onnx.nodes import Nodes

Rule = tuple[Callable[[Call], None], str]  # what writes a node out; the names of its inputs

_QKV = "query key value"
_BIASED = "X bias"
_NORM = "input skip gamma beta bias"
_EMBED = "word_embedding position_embedding segment_embedding gamma beta mask position_ids"
_GQA = (
    f"{_QKV} past_key past_value seqlens_k total_sequence_length cos_cache sin_cache position_ids "
    "attention_bias head_sink k_scale v_scale q_norm_weight k_norm_weight query_seqlens"
)
_MHA = (
    f"{_QKV} bias key_padding_mask attention_bias past_key past_value past_sequence_length "
    "cache_indirection"
)
RULES: Mapping[str, Rule] = {
    "SimplifiedLayerNormalization": (layers.simplified_norm, "X gamma"),
    **{
        f"com.microsoft::{kind}": rule
        for kind, rule in {
            "Attention": (
                attention.merged,
                "input weights bias mask_index past attention_bias past_sequence_length",
            ),
            "BiasGelu": (layers.gelu, _BIASED),
            "EmbedLayerNormalization": (layers.embed_norm, f"input_ids segment_ids {_EMBED}"),
            "FastGelu": (layers.fast_gelu, _BIASED),
            "FusedMatMul": (layers.fused_product, "A B"),
            "Gelu": (layers.gelu, _BIASED),
            "GroupQueryAttention": (attention.grouped, _GQA),
            "MultiHeadAttention": (attention.multi_head, _MHA),
            "QuickGelu": (layers.quick_gelu, _BIASED),
            "RotaryEmbedding": (rotary, "input position_ids cos_cache sin_cache"),
            "SkipLayerNormalization": (layers.skip_norm, _NORM),
            "SkipSimplifiedLayerNormalization": (
                layers.skip_simplified_norm,
                "input skip gamma bias",
            ),
        }.items()
    },
}


def write_out(model: Any) -> list[str]:
    """Rewrite a model in place, of opset 17 or later; return what was done, in words.

    Raises
    ------
    RejectedError
        A node does what ONNX's operators can't say, or what shards can't do.

    """
    kinds = [operator(node) for node in model.graph.node]
    (opset,) = (each for each in model.opset_import if each.domain in STANDARD)
    found = sorted({kind for kind in kinds if kind in RULES})
    if not found:
        return []
    shapes = Lengths(model, at_lengths(model, {}, {}, (ANY,)), only=())
    used = {name for node in model.graph.node for name in reads(node)}
    used.update(value.name for value in model.graph.output)
    nodes: list[Any] = []
    for node, kind in zip(model.graph.node, kinds, strict=True):
        made = [node]
        if kind in RULES:
            call = _call(node, RULES[kind], frozenset(used), shapes, opset.version)
            RULES[kind][0](call)
            made = call.nodes.made
            model.graph.initializer.extend(call.nodes.constants)
            shapes.take_constants(call.nodes.constants)
        for each in made:
            shapes.run(each)
        nodes += made
    set_nodes(model.graph, nodes)
    prune(model.graph)
    count = sum(kind in RULES for kind in kinds)
    names = ", ".join(kind.removeprefix("com.microsoft::") for kind in found)
    return [f"{count} nodes of ONNX Runtime's own written out: {names}"]


def _call(node: Any, rule: Rule, used: frozenset[str], shapes: Lengths, opset: int) -> Call:
    inputs = dict(zip(rule[1].split(), node.input, strict=False))
    return Call(node, inputs, used, Nodes(f"{node.output[0]}_mdattn"), shapes, opset)
