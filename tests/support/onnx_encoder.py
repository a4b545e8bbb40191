"""A small BERT as PyTorch's older exporter wrote it: what ONNX Runtime's optimizer fuses."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from tests.support.onnx_graph import FLOAT, INT64, graph, node

WIDTH, HEADS, LONGEST = 32, 4, 512
RANDOM = np.random.default_rng(3)


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def encoder(layers: int = 2) -> Any:
    """Ids and a mask of padding; words and places, then layers; everything in single steps."""
    nodes = [
        node("Shape", ["ids"], ["shape"]),
        node("Gather", ["shape", "1"], ["count"], axis=0),
        node("Unsqueeze", ["count", "[0]"], ["end"]),
        node("Slice", ["numbers", "[0]", "end", "[1]"], ["positions"]),
        node("Gather", ["words", "ids"], ["word"]),
        node("Gather", ["places", "positions"], ["place"]),
        node("Add", ["word", "place"], ["sum"]),
        node("LayerNormalization", ["sum", "gain", "shift"], ["x0"], axis=-1),
        node("Unsqueeze", ["attention_mask", "[1]"], ["mask3"]),
        node("Unsqueeze", ["mask3", "[2]"], ["mask4"]),
        node("Cast", ["mask4"], ["seen"], to=FLOAT),
        node("Sub", ["1.0", "seen"], ["blocked"]),
        node("Mul", ["blocked", "lowest"], ["mask"]),
        *(part for number in range(layers) for part in layer(number)),
        node("Identity", [f"x{layers}"], ["out"]),
    ]
    weights = {
        "1": np.int64(1),
        "[0]": np.array([0]),
        "[1]": np.array([1]),
        "[2]": np.array([2]),
        "1.0": np.float32(1),
        "0.5": np.float32(0.5),
        "root": np.float32(sqrt(WIDTH // HEADS)),
        "sqrt2": np.float32(sqrt(2)),
        "lowest": np.float32(-10000),
        "split": np.array([0, 0, HEADS, WIDTH // HEADS]),
        "joined": np.array([0, 0, WIDTH]),
        "numbers": np.arange(LONGEST)[None],
        "words": normal(600, WIDTH),
        "places": normal(LONGEST, WIDTH),
        "gain": 1 + 0.1 * normal(WIDTH),
        "shift": normal(WIDTH),
    }
    for number in range(layers):  # a bias of its own for each, as in a model
        sizes = {**dict.fromkeys("qkvo", (WIDTH, WIDTH)), "u": (WIDTH, 64), "d": (64, WIDTH)}
        for name, size in sizes.items():
            weights[f"w{name}{number}"] = normal(*size) / 4
            weights[f"b{name}{number}"] = normal(size[1])
    ids = ["B", "S"]
    inputs = {"ids": (ids, INT64), "attention_mask": (ids, INT64)}
    return graph(nodes, inputs, {"out": ["B", "S", WIDTH]}, weights, opset=17)


def layer(number: int) -> list[Any]:
    """Attention and feed-forward, each with a residual and a norm behind it."""

    def linear(source: str, name: str) -> list[Any]:
        product, result = f"{name}{number}_product", f"{name}{number}_linear"
        return [
            node("MatMul", [source, f"w{name}{number}"], [product]),
            node("Add", [f"b{name}{number}", product], [result]),
        ]

    def of(*names: str) -> list[str]:
        return [f"{name}{number}" for name in names]

    x = f"x{number}"
    return [
        *linear(x, "q"),
        *linear(x, "k"),
        *linear(x, "v"),
        *(node("Reshape", [f"{n}{number}_linear", "split"], of(n + "s")) for n in "qkv"),
        node("Transpose", of("qs"), of("qt"), perm=[0, 2, 1, 3]),
        node("Transpose", of("ks"), of("kt"), perm=[0, 2, 3, 1]),
        node("Transpose", of("vs"), of("vt"), perm=[0, 2, 1, 3]),
        node("MatMul", of("qt", "kt"), of("scores")),
        node("Div", [*of("scores"), "root"], of("scaled")),
        node("Add", [*of("scaled"), "mask"], of("masked")),
        node("Softmax", of("masked"), of("weights"), axis=-1),
        node("MatMul", of("weights", "vt"), of("heads")),
        node("Transpose", of("heads"), of("tokens"), perm=[0, 2, 1, 3]),
        node("Reshape", [*of("tokens"), "joined"], of("attended")),
        *linear(f"attended{number}", "o"),
        node("Add", [f"o{number}_linear", x], of("y")),
        node("LayerNormalization", [*of("y"), "gain", "shift"], of("z"), axis=-1),
        *linear(f"z{number}", "u"),
        node("Div", [f"u{number}_linear", "sqrt2"], of("divided")),
        node("Erf", of("divided"), of("erf")),
        node("Add", [*of("erf"), "1.0"], of("more")),
        node("Mul", [f"u{number}_linear", *of("more")], of("twice")),
        node("Mul", [*of("twice"), "0.5"], of("gelu")),
        *linear(f"gelu{number}", "d"),
        node("Add", [f"d{number}_linear", *of("z")], of("last")),
        node("LayerNormalization", [*of("last"), "gain", "shift"], [f"x{number + 1}"], axis=-1),
    ]
