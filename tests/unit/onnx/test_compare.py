"""Sharded against whole in ONNX Runtime: right, wrong and inconclusive are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.onnx import compare as compare_module  # noqa: E402
from mdattn_mpi.onnx import lengths, segments  # noqa: E402
from mdattn_mpi.onnx import ranks as in_one_process  # noqa: E402
from mdattn_mpi.onnx import shard as shard_module  # noqa: E402
from mdattn_mpi.onnx.compare import compare  # noqa: E402
from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import read_sharding  # noqa: E402
from tests.support.onnx_decoder import HEADS, WIDTH, decoder, normal  # noqa: E402
from tests.support.onnx_graph import INT64, graph, node  # noqa: E402


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


@pytest.mark.parametrize(("ranks", "strategy"), [(3, "allgather"), (4, "ulysses")])
def test_keys_of_two_sequences_are_counted_apart(ranks: int, strategy: Any) -> None:
    heads = {"q_num_heads": 4, "kv_num_heads": 4}
    nodes = [
        node("Attention", "xxx", "a", is_causal=1, **heads),
        node("Attention", "acc", "o", **heads),
    ]
    whole = graph(nodes, {"x": [1, "S", 32], "c": [1, "T", 32]}, {"o": [1, "S", 32]})
    found = held(whole, ranks, strategy)
    assert found.verdict == "right", found


def fixed(tokens: int) -> Any:
    """One attention that takes so many tokens, and no other number."""
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["o"], name="a")
    tensors = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4, tokens, 8])
        for name in "qkvo"
    ]
    graph = onnx.helper.make_graph([node], "g", tensors[:3], tensors[3:])
    opsets = [onnx.helper.make_opsetid("", 23)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_a_model_of_a_fixed_length_is_compared_at_it() -> None:
    found = held(fixed(33), 2)
    assert (found.tokens, found.verdict) == (33, "right")
    with pytest.raises(RejectedError, match="2 ranks don't divide 33 tokens"):
        held(fixed(33), 2, "ring")
    with pytest.raises(RejectedError, match="takes 5000 tokens only"):
        held(fixed(5000), 2)


def stored_in_bytes(model: Any) -> Any:
    """Let the products' weights be of 8 bits, with a factor."""
    for name in ("wq", "wk", "wv"):
        (weight,) = (each for each in model.graph.initializer if each.name == name)
        values = onnx.numpy_helper.to_array(weight)
        whole = np.round(values * 64).astype(np.int8)
        weight.CopyFrom(onnx.numpy_helper.from_array(whole, f"{name}8"))
        parts = [
            onnx.helper.make_node("Cast", [f"{name}8"], [f"{name}f"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Mul", [f"{name}f", "64th"], [name]),
        ]
        for part in reversed(parts):
            model.graph.node.insert(0, part)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1 / 64), "64th"))
    return model


def of_any_batch(model: Any) -> Any:
    """Let the batch be a symbol, that shapes are made of."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "B"
    make = onnx.helper.make_node
    parts = [make("Shape", ["ids"], ["batch"], start=0, end=1)]
    for name in ("heads", "flat"):
        (shape,) = (each for each in model.graph.initializer if each.name == name)
        rest = onnx.numpy_helper.to_array(shape)[1:]
        shape.CopyFrom(onnx.numpy_helper.from_array(rest, f"{name}_rest"))
        parts.append(make("Concat", ["batch", f"{name}_rest"], [name], axis=0))
    for part in reversed(parts):
        model.graph.node.insert(0, part)
    return model


@pytest.mark.parametrize("written", [of_any_batch, stored_in_bytes])
def test_cast_as_people_write_it(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "WEIGHTS", 512)  # as if they were large: not looked into
    model = written(decoder())
    sharded, _ = shard_model(model, "allgather", 2, {}, "float16")
    kinds = {tensor.data_type for tensor in sharded.graph.initializer}
    assert onnx.TensorProto.INT8 not in kinds  # TensorRT has no such constants
    found = held(model, 2, dtype="float16")
    assert found.verdict == "right", found


def test_weights_that_are_handed_over_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay what they were, whatever becomes of the memory that they came from."""
    monkeypatch.setattr(segments, "LARGE", 64)
    found = held(decoder(), 2)
    assert found.verdict == "right", found
    model, ids = decoder(), {"ids": np.arange(17)[None]}
    whole = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    session = segments.open_session(model)
    (words,) = (tensor for tensor in model.graph.initializer if tensor.name == "words")
    assert not words.raw_data
    np.ones(1 << 20).sum()  # where the weights were there may be something else now
    assert np.allclose(session.run(None, ids)[0], whole.run(None, ids)[0], atol=1e-5)


@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
@pytest.mark.parametrize("window", [None, 5])
def test_cast(strategy: Any, window: int | None) -> None:
    found = held(decoder(window=window), 2, strategy, dtype="float16")
    assert found.verdict == "right", found
    assert max(each.error for each in found.tensors) < 2e-3
    assert found.rounding is not None
    assert 1e-4 < found.rounding < 5e-2  # it is another precision
    assert "casting makes" in str(found)


def test_cast_of_what_products_make_of_each_other() -> None:
    """A table's rows, products and an attention that read each other, with nothing between."""
    heads = {"q_num_heads": 4, "kv_num_heads": 4}
    nodes = [
        node("Gather", ["words", "ids"], "x"),
        *(node("MatMul", ["x", f"w{name}"], name) for name in "qkv"),
        node("Attention", "qkv", "a", is_causal=1, **heads),
        node("MatMul", ["a", "wo"], "o"),
    ]
    random = np.random.default_rng(5)
    weights = {f"w{name}": random.standard_normal((32, 32)) / 4 for name in "qkvo"}
    weights["words"] = random.standard_normal((50, 32))
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    whole = graph(nodes, {"ids": ([1, "S"], INT64)}, {"o": [1, "S", 32]}, weights)
    found = held(whole, 2, dtype="float16")
    assert found.verdict == "right", found
    sharded, _ = shard_model(whole, "allgather", 2, {}, "float16")
    read = {node.input[0] for node in sharded.graph.node if node.op_type == "MatMul"}
    assert read == {"x_float16", "a_float16"}  # as they come, without a cast


def test_rounding_does_not_hide_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values off by 0.1%: as much as a deep model in 16 bits may be off by itself."""
    exchange = in_one_process.exchange

    def nearly(operation: str, arrays: list[Any], dim: int = 0) -> list[Any]:
        return [(1.001 * array).astype(array.dtype) for array in exchange(operation, arrays, dim)]

    monkeypatch.setattr(in_one_process, "exchange", nearly)
    found = held(decoder(), 2, dtype="float16")
    assert 2e-3 < max(each.error for each in found.tensors) < 5e-2
    assert found.verdict == "inconclusive"


def test_a_cast_that_changes_the_model_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """However alike its shards are to the same cast on one rank."""
    original = compare_module.prepare

    def other(model: Any, named: Any, dtype: Any) -> Any:
        prepared = original(model, named, dtype)
        for tensor in prepared.model.graph.initializer:
            if tensor.name == "wv_float16":
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values * 2, tensor.name))
        return prepared

    monkeypatch.setattr(compare_module, "prepare", other)
    monkeypatch.setattr(shard_module, "prepare", other)
    found = held(decoder(), 2, dtype="float16")
    assert max(each.error for each in found.tensors) < 2e-3
    assert found.verdict == "wrong"
    assert "the cast alone moves values by more than 5%" in str(found)


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
    monkeypatch.setattr(in_one_process, "exchange", in_one_process.forget)
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
    attend = in_one_process.attend
    monkeypatch.setattr(in_one_process, "attend", lambda *given: np.zeros_like(attend(*given)))
    assert held(decoder(), 2).verdict == "wrong"
