"""Attention in single steps: what is done to its scores is kept, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.onnx.compare import compare  # noqa: E402
from mdattn_mpi.onnx.lengths import Lengths  # noqa: E402
from mdattn_mpi.onnx.model import ATTENTION, attribute_of, copied, operator  # noqa: E402
from mdattn_mpi.onnx.ranks import attend  # noqa: E402
from mdattn_mpi.onnx.segments import Segments, open_session  # noqa: E402
from mdattn_mpi.onnx.shard import prepare, shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import read_sharding  # noqa: E402
from tests.support.onnx_graph import graph, node  # noqa: E402

HEADS, DIM, TOKENS, CAP = 4, 8, 19, 2.5
SHAPE = [1, HEADS, "S", DIM]
RANDOM = np.random.default_rng(17)
POSITIONS = [
    node("Shape", "q", ["count"], start=2, end=3),
    node("Squeeze", ["count"], "n"),
    node("Range", ["start", "n", "step"], "p"),
    node("Unsqueeze", ["p", "one"], "r"),
    node("LessOrEqual", "pr", ["causal"]),
    node("Sub", "rp", ["far"]),
    node("LessOrEqual", ["far", "three"], ["near"]),
    node("Not", ["near"], ["away"]),
    node("Where", ["near", "nothing", "lowest"], ["window"]),
    node("Where", ["causal", "nothing", "lowest"], ["past"]),
]
WEIGHTS = {
    "start": np.int64(0),
    "step": np.int64(1),
    "three": np.int64(3),
    "one": np.array([1]),
    "half": np.float32(0.5),
    "cap": np.float32(CAP),
    "nothing": np.float32(0),
    "lowest": np.float32(np.finfo(np.float32).min),
    "table": RANDOM.standard_normal((DIM, 9)).astype(np.float32),
    "zero": np.array([0]),
    "minus": np.array([-1]),
    "last": np.array([3]),
}


def steps(*changes: Any, product: str = "MatMul", last: str = "w", out: str = "a") -> Any:
    """`changes` take the scores ``s`` to ``w``, of which Softmax makes ``a``."""
    nodes = [
        *POSITIONS,
        node("Transpose", "k", "t", perm=[0, 1, 3, 2]),
        node("MatMul", "qt", "s")
        if product == "MatMul"
        else node("Einsum", "qk", "s", equation="bnid,bnjd->bnij"),
        *changes,
        node("Softmax", [last], "a", axis=-1, name="bad"),
        *([node("Slice", ["a", "zero", "minus", "last"], [out])] if out != "a" else []),
        node("MatMul", [out, "v"], "o"),
    ]
    return graph(nodes, dict.fromkeys("qkv", SHAPE), {"o": SHAPE}, WEIGHTS)


def capped(*after: Any) -> Any:
    """Scores, halved, that a Tanh keeps within ±CAP."""
    return steps(
        node("Mul", ["s", "half"], "h"),
        node("Div", ["h", "cap"], "d"),
        node("Tanh", "d", "i"),
        node("Mul", ["cap", "i"], "w"),
        *after,
        last=after[-1].output[0] if after else "w",
    )


def run(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Prepare a model, and run it in segments on one rank; return its attention too."""
    prepared = prepare(copied(model), {}).model
    dims = {name: array.shape for name, array in inputs.items()}
    steps = Segments(prepared, Lengths(prepared, dims).types).run(inputs)
    answer = None
    try:
        while True:
            call = steps.send(answer)
            answer = attend(call.node, *call.inputs)
    except StopIteration as end:
        (found,) = (node for node in prepared.graph.node if operator(node) in ATTENTION)
        return end.value["o"], found


@pytest.mark.parametrize("after", [[], [node("Add", ["w", "past"], "z")]], ids=["all", "causal"])
def test_a_softcap(after: Sequence[Any]) -> None:
    """It is the attention's own: in the engine of TensorRT there would be none."""
    model = capped(*after)
    inputs = {
        name: 2 * RANDOM.standard_normal((1, HEADS, TOKENS, DIM)).astype(np.float32)
        for name in "qkv"
    }
    (whole,) = open_session(model).run(None, inputs)
    found, attention = run(model, inputs)
    assert attribute_of(attention, "softcap") == CAP
    assert np.abs(found - whole).max() < 1e-5
    uncapped = steps(node("Mul", ["s", "half"], "w"), *after, last="z" if after else "w")
    assert np.abs(run(uncapped, inputs)[0] - whole).max() > 0.1


@pytest.mark.parametrize("kind", ["Attention", "TRT_Attention", ""])
@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
def test_a_softcap_is_refused_for_tensorrt(strategy: Any, kind: str) -> None:
    """Its parser refuses it, or reads over it."""
    attention = node(kind, "qkv", "o", softcap=CAP)
    whole = graph([attention], dict.fromkeys("qkv", SHAPE), {"o": SHAPE}) if kind else capped()
    with pytest.raises(RejectedError, match="has a softcap, which TensorRT's attention hasn't"):
        shard_model(whole, strategy, 2, {})


SEEN = node("Where", ["causal", "s", "lowest"], "w")
TWO_MASKS = {
    "seen and added": [SEEN, node("Add", ["w", "window"], "z")],
    "added and seen": [
        node("Add", ["s", "window"], "w"),
        node("Where", ["causal", "w", "lowest"], "z"),
    ],
    "seen and blocked": [SEEN, node("Where", ["away", "lowest", "w"], "z")],
    "added and added": [node("Add", ["s", "past"], "w"), node("Add", ["window", "w"], "z")],
}


@pytest.mark.parametrize("name", TWO_MASKS)
def test_two_masks(name: str) -> None:
    model = steps(*TWO_MASKS[name], last="z")
    sharded, done = shard_model(model, "allgather", 3, {})
    assert any("a window of 3 keys before and 0 keys after" in line for line in done), done
    found = compare(model, Path(), sharded, read_sharding(sharded, Path()))
    assert found.verdict == "right", found


RELATIVE = [
    node("MatMul", ["q", "table"], "b"),
    node("Gather", ["b", "three"], "u", axis=3),
    node("Unsqueeze", ["u", "last"], "g"),
    node("Add", "sg", "w"),
]
UNKNOWN = {
    "relative positions": (
        lambda: steps(*RELATIVE),
        r"to whose scores node 'w' \(Add\) adds others",
    ),
    "Einsum": (lambda: steps(*RELATIVE, product="Einsum"), r"node 'w' \(Add\) adds others"),
    "quantized": (
        lambda: steps(
            node("QuantizeLinear", ["s", "half"], "b"),
            node("DequantizeLinear", ["b", "half"], "w"),
        ),
        r"whose scores go through node 'w' \(DequantizeLinear\)",
    ),
    "Softmax over two dims, as before opset 13": (
        lambda: steps(node("Flatten", "s", "w", axis=3), out="c"),
        r"whose scores go through node 'w' \(Flatten\)",
    ),
    "sinks": (
        lambda: steps(
            node("Slice", ["q", "zero", "one", "last"], "e"),
            node("Concat", "se", "w", axis=3),
            out="c",
        ),
        r"whose scores go through node 'w' \(Concat\)",
    ),
}


@pytest.mark.parametrize("others", [[], [node("Attention", "ooo", ["out"])]], ids=["alone", "two"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_scores_that_no_attention_of_ours_makes(name: str, others: Sequence[Any]) -> None:
    """Told once, and not as a product over the tokens or a model without attention."""
    make, why = UNKNOWN[name]
    model = make()
    if others:
        model.graph.node.extend(others)
        model.graph.output[0].name = "out"
    with pytest.raises(RejectedError, match=rf"^node 'bad' \(Softmax\) is of an attention .*{why}"):
        shard_model(model, "allgather", 2, {})


def test_an_attention_inside_of_each_token() -> None:
    """Between a token's own heads: it may do to its scores what it likes."""
    nodes = [
        node("Reshape", ["x", "apart"], "h"),
        node("Transpose", "h", "t", perm=[0, 2, 1]),
        node("MatMul", "ht", "s"),
        node("Clip", ["s", "", "half"], "w"),
        node("Softmax", "w", "a", axis=-1),
        node("MatMul", "ah", "y"),
        node("Reshape", ["y", "joined"], "z"),
        node("Attention", "zzz", "o", q_num_heads=HEADS, kv_num_heads=HEADS),
    ]
    shape = [1, "S", HEADS * DIM]
    shapes = {"apart": np.array([-1, HEADS, DIM]), "joined": np.array([1, -1, HEADS * DIM])}
    model = graph(nodes, {"x": shape}, {"o": shape}, {**WEIGHTS, **shapes})
    sharded, _ = shard_model(model, "allgather", 3, {})
    found = compare(model, Path(), sharded, read_sharding(sharded, Path()))
    assert found.verdict == "right", found
