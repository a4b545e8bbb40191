"""The operators of ONNX Runtime's own: sharded, and held against ONNX Runtime on the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.errors import RejectedError  # noqa: E402
from mdattn_mpi.onnx.compare import compare  # noqa: E402
from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import read_sharding  # noqa: E402
from tests.support.onnx_graph import INT64, graph, node  # noqa: E402

INT32 = onnx.TensorProto.INT32
HEADS, KV, DIM, WIDTH = 12, 4, 16, 192
RANDOM = np.random.default_rng(5)


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def own(kind: str, inputs: Any, outputs: Any = ("o",), **attributes: Any) -> Any:
    return node(kind, inputs, outputs, domain="com.microsoft", **attributes)


def model(nodes: list[Any], inputs: dict[str, Any], weights: Any = None, opset: int = 14) -> Any:
    """Nodes that make ``o``; the opset is one of when these fusions came up."""
    made = graph(nodes, inputs, {"o": None}, weights, opset)
    made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return made


def multi_head(
    inputs: str = "qkv",
    first: Any = (),
    weights: Any = None,
    others: Any = None,
    opset: int = 14,
    outputs: Any = ("o",),
    **attributes: Any,
) -> Any:
    """MultiHeadAttention of three joined inputs; further ones by their names, ``-`` for none."""
    names = ["" if name == "-" else name for name in inputs.split()]
    names = [*"qkv", *names[1:]] if names[0] == "qkv" else names
    shapes = {name: [1, "S", WIDTH] for name in "qkv" if name in names} | (others or {})
    attend = own("MultiHeadAttention", names, outputs, num_heads=HEADS, **attributes)
    made = model([*first, attend], shapes, weights, opset)
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs[1:])
    return made


def packed(names: str, count: int) -> tuple[Any, Any]:
    """One input for several; and the same of parts, for ONNX Runtime's CPUs can't do it packed."""
    inputs = {"p": [1, "S", HEADS, count, DIM]}
    parts = [
        part
        for number, name in enumerate("qkv"[3 - count :])
        for part in (
            node("Gather", ["p", f"i{number}"], [f"{name}4"], axis=3),
            node("Reshape", [f"{name}4", "flat"], [name]),
        )
    ]
    weights: dict[str, Any] = {f"i{number}": np.int64(number) for number in range(count)}
    weights["flat"] = np.array([0, 0, -1])
    whole = multi_head(names, others=inputs)
    apart = multi_head(first=parts, weights=weights, others=inputs)
    for name in "qkv"[3 - count :]:
        (value,) = (each for each in apart.graph.input if each.name == name)
        apart.graph.input.remove(value)
    return whole, apart


def cross() -> Any:
    shapes = {"k": [1, "T", WIDTH], "v": [1, "T", WIDTH]}
    return multi_head(others=shapes)


def causal_bias() -> Any:
    """A mask that is added to the scores, made of positions."""
    first = [
        node("Shape", "q", ["count"], start=1, end=2),
        node("Squeeze", ["count"], ["n"]),
        node("Range", ["zero", "n", "one"], ["columns"]),
        node("Unsqueeze", ["columns", "axis"], ["rows"]),
        node("LessOrEqual", ["columns", "rows"], ["seen"]),
        node("Where", ["seen", "nothing", "lowest"], ["flat"]),
        node("Unsqueeze", ["flat", "axes"], ["bias"]),
    ]
    weights = {
        "zero": np.int64(0),
        "one": np.int64(1),
        "axis": np.array([1]),
        "axes": np.array([0, 1]),
        "nothing": np.float32(0),
        "lowest": np.float32(-1e9),
    }
    return multi_head("qkv - - bias", first, weights, opset=16)


def merged(inputs: str = "x w b", first: Any = (), others: Any = None, **attributes: Any) -> Any:
    """Attention: a product makes queries, keys and values; its mask is made of ``mask``."""
    names = ["" if name == "-" else name for name in inputs.split()]
    sizes = attributes.get("qkv_hidden_sizes", [WIDTH] * 3)
    weights = {"w": normal(32, sum(sizes)) / 4, "b": normal(sum(sizes)), "one": np.array([1])}
    attend = own("Attention", names, num_heads=HEADS, **attributes)
    return model([*first, attend], {"x": [1, "S", 32], **(others or {})}, weights)


def grouped(
    inputs: str = "q k v", more: Any = (), others: Any = None, tables: int = DIM // 2, **attrs: Any
) -> Any:
    """GroupQueryAttention; how many keys there are is counted in ``mask``, as exporters do."""
    names = ["" if name == "-" else name for name in inputs.split()]
    shapes = {"q": [1, "S", WIDTH], "k": [1, "S", KV * DIM], "v": [1, "S", KV * DIM]}
    shapes = {name: shape for name, shape in shapes.items() if name in names}
    angles = np.arange(512)[:, None] * np.linspace(1, 0.1, tables)
    weights = {
        "axis": np.array([1]),
        "one": np.int64(1),
        "end": np.array(1),
        "cos": np.cos(angles).astype("f4"),
        "sin": np.sin(angles).astype("f4"),
    }
    nodes = [
        node("ReduceSum", ["mask", "axis"], ["sum"], keepdims=0),
        node("Sub", ["sum", "one"], ["last"]),
        node("Cast", ["last"], ["lengths"], to=INT32),
        node("Shape", ["mask"], ["size"]),
        node("Gather", ["size", "end"], ["total"], axis=0),
        node("Cast", ["total"], ["whole"], to=INT32),
        own(
            "GroupQueryAttention",
            [*names, *[""] * (3 - len(names)), "", "", "lengths", "whole", *more],
            ("o", "", ""),
            num_heads=HEADS,
            kv_num_heads=KV,
            **attrs,
        ),
    ]
    mask = {"mask": ([1, "S"], INT64)}
    return model(nodes, {**shapes, **mask, **(others or {})}, weights)


MASK = {"mask": ([1, "S"], INT32)}
COUNTED = [node("ReduceSum", ["mask", "one"], ["counts"], keepdims=0)]
FORMS = {
    "three inputs": multi_head,
    "a bias": lambda: multi_head("qkv b", weights={"b": normal(3 * WIDTH)}),
    "packed": lambda: packed("p", 3),
    "packed keys": lambda: packed("q p", 2),
    "keys that are split": lambda: multi_head(others={name: [1, HEADS, "T", DIM] for name in "kv"}),
    "padding": lambda: multi_head("qkv - mask", others=MASK),
    "a row of padding a query": lambda: multi_head(
        "qkv - rows",
        [
            node("Unsqueeze", ["mask", "one"], ["row"]),
            node("Unsqueeze", ["mask", "two"], ["column"]),
            node("Mul", ["row", "column"], ["rows"]),
        ],
        {"one": np.array([1]), "two": np.array([2])},
        MASK,
    ),
    "one direction": lambda: multi_head(unidirectional=1),
    "a scale": lambda: multi_head(scale=0.7),
    "another sequence": cross,
    "a causal mask that is added": causal_bias,
    "merged": merged,
    "merged, without a bias": lambda: merged("x w"),
    "merged, a mask": lambda: merged("x w b mask", others=MASK),
    "merged, a count": lambda: merged("x w b counts", COUNTED, MASK),
    "merged, one direction": lambda: merged(unidirectional=1),
    "merged, values of another head dim": lambda: merged(qkv_hidden_sizes=[WIDTH, WIDTH, 24]),
    "grouped": grouped,
    "grouped, packed": lambda: grouped("p", others={"p": [1, "S", WIDTH + 2 * KV * DIM]}),
    "grouped, a window": lambda: grouped(local_window_size=5),
    "grouped, a scale": lambda: grouped(scale=0.6),
    "grouped, turned": lambda: grouped(more=("cos", "sin"), do_rotary=1),
    "grouped, turned pairs": lambda: grouped(
        more=("cos", "sin"), do_rotary=1, rotary_interleaved=1
    ),
    "grouped, turned by positions": lambda: grouped(
        more=("cos", "sin", "position_ids"), others={"position_ids": ([1, "S"], INT64)}, do_rotary=1
    ),
}


WAYS = ((2, "allgather"), (2, "ulysses"), (3, "allgather"), (4, "ulysses"))


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    """As ONNX Runtime has it, on ranks that don't divide the tokens."""
    made = FORMS[form]()
    fused, whole = made if isinstance(made, tuple) else (made, made)
    for ranks, strategy in WAYS:
        sharded, _ = shard_model(fused, strategy, ranks, {})  # type: ignore[arg-type]
        found = compare(whole, Path(), sharded, read_sharding(sharded, Path()))
        assert found.verdict == "right", found
        assert found.tokens % ranks
        (control,) = (each.control for each in found.tensors if each.control is not None)
        assert max(each.error for each in found.tensors) < 1e-5 < 0.05 < control


PAST = {name: [1, KV, "P", DIM] for name in ("pk", "pv")}
REFUSED = {
    "has past keys": lambda: multi_head(
        "qkv - - - pk pv", others={name: [1, HEADS, "P", DIM] for name in PAST}
    ),
    "gives keys for a cache": lambda: multi_head(outputs=("o", "present")),
    "has a bias for keys that are packed": lambda: multi_head(
        "q p - b", weights={"b": normal(3 * WIDTH)}, others={"p": [1, "S", HEADS, 2, DIM]}
    ),
    "has a mask of 1 dims": lambda: merged("x w b ends", others={"ends": ([4], INT32)}),
    "angles of its own": lambda: merged(do_rotary=1),
    "has a softcap": lambda: grouped(softcap=30.0),
    "has a smooth softmax": lambda: grouped(smooth_softmax=1),
    "has sinks": lambda: grouped(more=["", "", "", "", "sinks"], others={"sinks": [HEADS]}),
    "a mask that is made of 'bias'": lambda: multi_head(
        "qkv - - bias", others={"bias": [1, HEADS, "S", "S"]}
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(why: str) -> None:
    with pytest.raises(RejectedError, match=f"node 'o.*{why}"):
        shard_model(REFUSED[why](), "allgather", 2, {})
