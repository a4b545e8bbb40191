"""Small models that jobs run, items for them, and what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.onnx_decoder import HEADS, decoder
from tests.support.onnx_graph import graph, node

LENGTHS = (61, 17, 1)  # the last leaves ranks without tokens
WINDOW = 5


def joined() -> Any:
    """An attention of 3-D inputs, heads in the last dim, values of another head dim."""
    shapes = {"q": [1, "S", HEADS * 8], "k": [1, "S", 2 * 8], "v": [1, "S", 2 * 16]}
    heads = {"q_num_heads": HEADS, "kv_num_heads": 2}
    attend = node("Attention", "qkv", "o", is_causal=1, scale=0.5, **heads)
    return graph([attend, node("Neg", "o", ["out"])], shapes, {"out": [1, "S", HEADS * 16]})


MODELS: dict[str, Callable[[], Any]] = {
    "decoder": lambda: decoder(window=WINDOW),
    "joined": joined,
}


def random_items(model: Any) -> list[dict[str, Any]]:
    """Inputs ``[1, S, …]`` of a model by name, for each of the lengths."""
    random = np.random.default_rng()
    return [
        {value.name: _random(value, tokens, random) for value in model.graph.input}
        for tokens in LENGTHS
    ]


def _random(value: Any, tokens: int, random: np.random.Generator) -> Any:
    width = [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:]
    if not width:
        return random.integers(0, 50, (1, tokens))
    return random.standard_normal((1, tokens, *width)).astype(np.float32)


def whole_output(model: Any, inputs: dict[str, Any]) -> Any:
    """``out`` of the whole model, in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["out"], inputs)[0]
