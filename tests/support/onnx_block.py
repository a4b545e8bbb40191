"""The attention block of docs/onnx.md, small; and what it computes, in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.network_interpreter import softmax

ROOT = Path(__file__).resolve().parents[2]
HEADS, HEAD_DIM = 8, 16


def make_block(**options: Any) -> Any:
    specification = importlib.util.spec_from_file_location(
        "make_attention_block", ROOT / "docs" / "make_attention_block.py"
    )
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.make_block(HEADS, head_dim=HEAD_DIM, **options)


def evaluate(model: Any, hidden: Any, kv_heads: int, causal: bool) -> Any:
    """The block in float64, written from its description and the weights alone."""
    from onnx import numpy_helper

    weights = {t.name: numpy_helper.to_array(t).astype(float) for t in model.graph.initializer}

    def project(name: str, x: Any) -> Any:
        (node,) = [n for n in model.graph.node if n.name == f"{name}_projection"]
        return x @ weights[node.input[1]]

    gains = [w for w in weights.values() if w.shape == (HEAD_DIM,)]
    tokens = hidden.shape[0]
    hidden = hidden[:, 0].astype(float)
    q, k, v = (
        project(name, hidden).reshape(tokens, heads, HEAD_DIM)
        for name, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = (
        x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * gain
        for x, gain in zip((q, k), gains, strict=True)
    )
    k, v = (np.repeat(x, HEADS // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("inh,jnh->nij", q, k) / np.sqrt(HEAD_DIM)
    if causal:
        scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    attended = np.einsum("nij,jnh->inh", softmax(scores), v)
    return project("o", attended.reshape(tokens, -1))[:, None]
