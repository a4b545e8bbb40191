"""A model that counts positions from its ids, as the RoBERTa family does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.support.onnx_graph import INT64, graph, node

WIDTH, PADDING = 32, 3
WORDS = (0, 1, 2, 4, 5, 6)  # the other ids
RANDOM = np.random.default_rng(5)
INT32 = onnx.TensorProto.INT32


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def roberta(told: str = "Not", axis: int = 1, **attributes: Any) -> Any:
    """Ids, positions counted from them, and one attention."""
    nodes = [
        node("Equal", ["ids", "padding"], ["same"]),
        node(told, ["same"], ["other"]),
        node("Cast", ["other"], ["one"], to=INT32),
        node("CumSum", ["one", "axis"], ["place"], name="bad", **attributes),
        node("Mul", ["place", "one"], ["own"]),
        node("Cast", ["own"], ["wide"], to=INT64),
        node("Add", ["wide", "padding"], ["row"]),
        node("Gather", ["places", "row"], ["where"]),
        node("Gather", ["words", "ids"], ["word"]),
        node("Add", ["word", "where"], ["x"]),
        node("Attention", "xxx", "o", q_num_heads=4, kv_num_heads=4),
    ]
    weights = {
        "padding": np.int64(PADDING),
        "axis": np.int64(axis),
        "places": normal(200, WIDTH),
        "words": normal(7, WIDTH),
    }
    return graph(nodes, {"ids": ([1, "S"], INT64)}, {"o": [1, "S", WIDTH]}, weights)
