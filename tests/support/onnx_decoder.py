"""A small decoder as exporters write one: positions by Range, attention in single steps, a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.onnx_graph import INT64, graph, node

WIDTH, HEADS = 32, 4
RANDOM = np.random.default_rng(11)


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def layer(number: int, mask: str) -> list[Any]:
    """Attention in single steps, with a mask that is added, and a residual."""
    own = {name: f"{name}{number}" for name in "qkvhtswabco"}
    heads = [
        part
        for name in "qkv"
        for part in (
            node("MatMul", [f"x{number}", f"w{name}"], [f"{own[name]}_flat"]),
            node("Reshape", [f"{own[name]}_flat", "heads"], [f"{own[name]}_split"]),
            node("Transpose", [f"{own[name]}_split"], [own[name]], perm=[0, 2, 1, 3]),
        )
    ]
    return [
        *heads,
        node("Transpose", [own["k"]], [own["t"]], perm=[0, 1, 3, 2]),
        node("MatMul", [own["q"], own["t"]], [own["s"]]),
        node("Add", [own["s"], mask], [own["w"]]),
        node("Softmax", [own["w"]], [own["a"]], axis=-1),
        node("MatMul", [own["a"], own["v"]], [own["b"]]),
        node("Transpose", [own["b"]], [own["c"]], perm=[0, 2, 1, 3]),
        node("Reshape", [own["c"], "flat"], [own["o"]]),
        node("Add", [f"x{number}", own["o"]], [f"x{number + 1}"]),
    ]


def decoder(layers: int = 2, window: int | None = None) -> Any:
    """Ids, learned positions by Range, causal (or windowed) attention: as exporters write it."""
    seen = [node("LessOrEqual", ["columns", "rows"], ["seen"])]
    if window:
        seen = [
            node("Sub", ["rows", "columns"], ["distance"]),
            node("Abs", ["distance"], ["far"]),
            node("LessOrEqual", ["far", "window"], ["seen"]),
        ]
    nodes = [
        node("Shape", ["ids"], ["count"], start=1, end=2),
        node("Squeeze", ["count"], ["n"]),
        node("Range", ["zero", "n", "one"], ["columns"]),
        node("Unsqueeze", ["columns", "axis"], ["rows"]),
        *seen,
        node("Where", ["seen", "nothing", "lowest"], ["mask"]),
        node("Gather", ["words", "ids"], ["word"]),
        node("Gather", ["places", "columns"], ["place"]),
        node("Add", ["word", "place"], ["x0"]),
        *(part for number in range(layers) for part in layer(number, "mask")),
        node("Identity", [f"x{layers}"], ["out"]),
    ]
    weights = {
        "zero": np.int64(0),
        "one": np.int64(1),
        "axis": np.array([1]),
        "window": np.int64(window or 0),
        "nothing": np.float32(0),
        "lowest": np.float32(np.finfo(np.float32).min),
        "heads": np.array([1, -1, HEADS, WIDTH // HEADS]),
        "flat": np.array([1, -1, WIDTH]),
        "words": normal(50, WIDTH),
        "places": normal(200, WIDTH),
        **{f"w{name}": normal(WIDTH, WIDTH) / 4 for name in "qkv"},
    }
    return graph(nodes, {"ids": ([1, "S"], INT64)}, {"out": [1, "S", WIDTH]}, weights, opset=17)
