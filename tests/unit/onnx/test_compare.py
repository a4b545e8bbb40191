"""Sharded against whole in ONNX Runtime: right, wrong and inconclusive are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.onnx import compare as comparison  # noqa: E402
from mdattn_mpi.onnx.compare import compare  # noqa: E402
from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import read_sharding  # noqa: E402
from tests.support.onnx_graph import INT64, graph, node  # noqa: E402

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


def held(model: Any, ranks: int, strategy: Any = "allgather", **more: Any) -> Any:
    sharded, _ = shard_model(model, strategy, ranks, {}, more.get("dtype"))
    path = Path("model.onnx")
    return compare(model, path, sharded, read_sharding(sharded, path), **more)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
@pytest.mark.parametrize("window", [None, 5])
def test_right(ranks: int, strategy: Any, window: int | None) -> None:
    if strategy == "ulysses" and HEADS % ranks:
        pytest.skip("4 heads aren't dealt to 3 ranks")
    found = held(decoder(window=window), ranks, strategy)
    assert found.verdict == "right", found
    assert found.tokens % ranks
    controls = [each.control for each in found.tensors if each.control is not None]
    assert len(controls) == 2
    assert max(each.error for each in found.tensors) < 2e-5 < 0.05 < min(controls)


@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
def test_cast(strategy: Any) -> None:
    found = held(decoder(), 2, strategy, dtype="float16")
    assert found.verdict == "right", found
    assert 1e-4 < max(each.error for each in found.tensors) < 5e-2  # it is another precision


def test_a_weight_that_float16_cannot_hold() -> None:
    model = decoder()
    (words,) = (each for each in model.graph.initializer if each.name == "words")
    words.CopyFrom(onnx.numpy_helper.from_array(1e5 * normal(50, WIDTH), "words"))
    with pytest.raises(RejectedError, match=r"'words' goes up to .*beyond float16") as caught:
        shard_model(model, "allgather", 2, {}, "float16")
    assert caught.value.fix == "use --dtype bf16"


def test_a_window_that_is_forgotten_is_wrong() -> None:
    """The sharded model of another window: what a short probe would have made of it."""
    model = decoder(window=20)
    sharded, _ = shard_model(decoder(window=30), "allgather", 2, {})
    for kind in ("words", "places", "wq", "wk", "wv"):  # the same weights
        (ours,) = (each for each in sharded.graph.initializer if each.name == kind)
        (theirs,) = (each for each in model.graph.initializer if each.name == kind)
        ours.CopyFrom(theirs)
    found = compare(model, Path(), sharded, read_sharding(sharded, Path()))
    assert found.verdict == "wrong"
    assert "wrong" in str(found)


def test_a_forgotten_exchange_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "exchange", comparison.forget)
    assert held(decoder(), 2).verdict == "wrong"


def test_even_attention_proves_nothing() -> None:
    """Queries of 0 and one value for all tokens: what is exchanged doesn't matter."""
    model = decoder()
    for name in ("wq", "wv"):
        (weight,) = (each for each in model.graph.initializer if each.name == name)
        weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((WIDTH, WIDTH), np.float32), name))
    found = held(model, 2)
    assert found.verdict == "inconclusive"
    assert "inconclusive" in str(found)


def test_zeros_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = comparison.attend
    monkeypatch.setattr(comparison, "attend", lambda *given: np.zeros_like(attend(*given)))
    assert held(decoder(), 2).verdict == "wrong"
