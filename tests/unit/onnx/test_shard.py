"""ONNX files from anywhere: what is found, mended, refused; and what TensorRT's parser honours."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import copied, load_model, mend, save_model
from mdattn_mpi.onnx.shard import shard_model
from mdattn_mpi.onnx.sharding import read_sharding
from tests.support.tensorrt import library, needs_tensorrt

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
from tests.support.onnx_decoder import decoder  # noqa: E402

helper, numpy_helper = onnx.helper, onnx.numpy_helper
HALF = onnx.TensorProto.FLOAT16

HEADS_FIRST = [1, 8, "S", 64]


def model(
    nodes: Sequence[Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: Sequence[Any] = (),
    opset: int = 23,
) -> Any:
    def values(shapes: dict[str, list[Any]]) -> list[Any]:
        return [helper.make_tensor_value_info(n, HALF, shape) for n, shape in shapes.items()]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def attention(kind: str = "Attention", **attributes: Any) -> Any:
    node = helper.make_node(kind, ["q", "k", "v"], ["o"], name="att", **attributes)
    inputs = {"q": HEADS_FIRST, "k": [1, 2, "S", 64], "v": [1, 2, "S", 64]}
    return model([node], inputs, {"o": HEADS_FIRST})


def after(*nodes: Any, weights: Sequence[Any] = (), output: Any = ("S", 8, 64)) -> Any:
    """A model whose `nodes` take ``x [S, 8, 64]`` to ``q``, beside a harmless attention."""
    back = helper.make_node("Transpose", ["y"], ["t"], name="back", perm=[1, 0, 2])
    axis = numpy_helper.from_array(np.array([0], np.int64), "zero")
    wide = helper.make_node("Unsqueeze", ["t", "zero"], ["q"], name="wide")
    attend = helper.make_node("Attention", ["q", "q", "q"], ["o"], name="att")
    return model(
        [*nodes, back, wide, attend],
        {"x": ["S", 8, 64]},
        {"o": HEADS_FIRST},
        [axis, *weights],
    )


@needs_tensorrt
@pytest.mark.parametrize("kind", ["Attention", "TRT_Attention"])
@pytest.mark.parametrize(
    ("spelling", "honoured"),
    [("nb_rank", 2), ("nbRanks", 1), ("nb_ranks", 1), ("num_ranks", 1)],
)
def test_what_the_parser_makes_of_every_spelling(kind: str, spelling: str, honoured: int) -> None:
    from mdattn_mpi.trt.library import Log
    from mdattn_mpi.trt.onnx_import import attentions

    found = library()
    log = Log(found)
    builder = found.api.Builder(log.sink)
    network = builder.create_network(
        1 << int(found.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = found.api.OnnxParser(network, log.sink)
    assert parser.parse(attention(kind, **{spelling: 2}).SerializeToString())
    assert [each.num_ranks for each in attentions(found.api, network)] == [honoured]


@pytest.mark.parametrize("spelling", ["nbRanks", "nb_ranks", "num_ranks"])
def test_a_misspelled_rank_count_is_mended_and_told(
    tmp_path: Path, spelling: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(attention(**{spelling: 4}).SerializeToString())
    with caplog.at_level(logging.WARNING):
        mended = load_model(path)
    assert [(a.name, a.i) for a in mended.graph.node[0].attribute] == [("nb_rank", 4)]
    assert f"'att': attribute {spelling} = 4" in caplog.text
    assert mend(mended) == []


@needs_tensorrt
def test_a_count_that_the_parser_left_at_one_is_set(caplog: pytest.LogCaptureFixture) -> None:
    from mdattn_mpi.trt.library import Log
    from mdattn_mpi.trt.onnx_import import attentions, check_rank_counts

    found = library()
    log = Log(found)
    builder = found.api.Builder(log.sink)
    flag = 1 << int(found.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def parsed(**attributes: Any) -> Any:
        network = builder.create_network(flag)
        parser = found.api.OnnxParser(network, log.sink)
        assert parser.parse(attention(**attributes).SerializeToString())
        return network

    network = parsed(nbRanks=2)
    with caplog.at_level(logging.WARNING):
        check_rank_counts(found.api, network, {"att": 2}, Path("m.onnx"))
    assert [each.num_ranks for each in attentions(found.api, network)] == [2]
    assert "set to 2" in caplog.text
    with pytest.raises(RejectedError, match="declares 4 ranks, TensorRT has 2"):
        check_rank_counts(found.api, parsed(nb_rank=2), {"att": 4}, Path("m.onnx"))
    with pytest.raises(RejectedError, match="has 2 attentions, TensorRT made 1"):
        check_rank_counts(found.api, parsed(), {"att": 1, "b": 1}, Path("m.onnx"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not onnx at all", b"\x89HDF\r\n\x1a\n"])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(RejectedError, match="not an ONNX file") as caught:
        load_model(path)
    assert caught.value.file == str(path)
    with pytest.raises(RejectedError, match="cannot read the model"):
        load_model(tmp_path / "none.onnx")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    weight = onnx.TensorProto(name="w", data_type=HALF, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    path = tmp_path / "deep" / "model.onnx"
    path.parent.mkdir()
    whole = attention()
    whole.graph.initializer.append(weight)
    path.write_bytes(whole.SerializeToString())
    with pytest.raises(RejectedError, match=r"initializer 'w'.*outside the model's folder"):
        load_model(path)


def test_external_data_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"12345678")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").symlink_to(tmp_path / "secret")
    whole = attention()
    whole.graph.node.append(helper.make_node("Identity", ["w"], ["copy"]))
    whole.graph.output.append(helper.make_tensor_value_info("copy", HALF, [4]))
    weight = whole.graph.initializer.add(name="w", data_type=HALF, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights")
    (folder / "model.onnx").write_bytes(whole.SerializeToString())
    with pytest.raises(RejectedError, match="outside the model's folder"):
        load_model(folder / "model.onnx")


def test_external_data_stays_where_it_is(tmp_path: Path) -> None:
    whole = attention()
    whole.graph.node.append(helper.make_node("Identity", ["w"], ["copy"]))
    whole.graph.output.append(helper.make_tensor_value_info("copy", HALF, [4]))
    weight = whole.graph.initializer.add(name="w", data_type=HALF, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights")
    (tmp_path / "weights").write_bytes(b"12345678")
    (tmp_path / "model.onnx").write_bytes(whole.SerializeToString())
    sharded, _ = shard_model(load_model(tmp_path / "model.onnx"), "ring", 2, {})
    with pytest.raises(RejectedError, match="relative to its folder"):
        save_model(sharded, tmp_path / "model.onnx", tmp_path / "other" / "out.onnx")
    save_model(sharded, tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert load_model(tmp_path / "out.onnx").graph.initializer[-1].name == "w"


def test_weights_too_many_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie beside it, and small ones, such as shapes, stay where they are read."""
    from mdattn_mpi.onnx import model as module
    from mdattn_mpi.onnx.segments import load_weights

    whole, path = decoder(), tmp_path / "out.onnx"
    monkeypatch.setattr(module, "LARGEST", 1 << 12)
    monkeypatch.setattr(module, "LARGE", 1 << 10)
    save_model(copied(whole), path, path)
    found = onnx.load(path, load_external_data=False)
    assert len(found.SerializeToString()) < 1 << 12 < (tmp_path / "out.onnx.data").stat().st_size
    outside = {each.name for each in found.graph.initializer if each.external_data}
    assert {"words", "wq"} <= outside
    assert not {"heads", "flat"} & outside
    read = load_weights(load_model(path), path)
    for one, other in zip(read.graph.initializer, whole.graph.initializer, strict=True):
        assert np.array_equal(*map(onnx.numpy_helper.to_array, (one, other)))


@pytest.mark.parametrize(
    ("data", "why"), [(None, "which isn't there"), (b"1234", "up to byte 8, which has 4")]
)
def test_external_data_that_is_missing(data: bytes | None, why: str, tmp_path: Path) -> None:
    """It is told as the file is read, and not from inside of onnx in the middle of a command."""
    whole = attention()
    weight = whole.graph.initializer.add(name="w", data_type=HALF, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights"), ("length", "8")):
        weight.external_data.add(key=key, value=value)
    (tmp_path / "model.onnx").write_bytes(whole.SerializeToString())
    if data:
        (tmp_path / "weights").write_bytes(data)
    with pytest.raises(RejectedError, match=rf"'w' has its data in 'weights'.* {why}") as caught:
        load_model(tmp_path / "model.onnx")
    assert "copy weights" in caught.value.fix
    (tmp_path / "weights").write_bytes(b"12345678")
    load_model(tmp_path / "model.onnx")


def test_sharding_travels_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    with pytest.raises(RejectedError, match="nothing in this model tells how it is sharded"):
        read_sharding(attention(), path)
    sharded, done = shard_model(attention(), "ulysses", 4, {})
    save_model(sharded, path, path)
    sharding = read_sharding(load_model(path), path)
    assert (sharding.strategy, sharding.ranks) == ("ulysses", 4)
    assert sharding.axes == {"q": 2, "k": 2, "v": 2, "o": 2}
    assert done == ["node 'att' (Attention): heads traded for tokens among 4 ranks"]


def test_the_original_is_left_as_it_is() -> None:
    original = attention()
    before = original.SerializeToString()
    shard_model(original, "allgather", 2, {})
    assert original.SerializeToString() == before


def test_no_attention() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    with pytest.raises(RejectedError, match="has no attention"):
        shard_model(model([node], {"x": ["S", 8]}, {"y": ["S", 8]}), "ring", 2, {})


@pytest.mark.parametrize(
    ("attributes", "strategy", "ranks", "why"),
    [
        ({"is_causal": 1}, "ring", 2, "'att' .Attention. is causal"),
        ({"is_causal": 1, "softcap": 2.0}, "allgather", 2, "'att' .* has a softcap"),
        ({}, "ulysses", 3, "'att' .* has 8 query heads, which don't divide among 3"),
    ],
)
def test_an_attention_that_cannot_be_shared(
    attributes: dict[str, Any], strategy: Any, ranks: int, why: str
) -> None:
    with pytest.raises(RejectedError, match=why):
        shard_model(attention(**attributes), strategy, ranks, {})


def test_kv_heads_that_cannot_be_dealt() -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["o"], name="att")
    inputs = {"q": [1, 12, "S", 64], "k": [1, 3, "S", 64], "v": [1, 3, "S", 64]}
    whole = model([node], inputs, {"o": [1, 12, "S", 64]})
    with pytest.raises(RejectedError, match=r"'att' .* has 3 kv heads"):
        shard_model(whole, "ulysses", 4, {})
    shard_model(whole, "ulysses", 6, {})


def test_harmless_nodes_pass() -> None:
    weights = [
        numpy_helper.from_array(np.ones((64, 64), np.float16), "w"),
        numpy_helper.from_array(np.ones(64, np.float16), "g"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="project"),
        helper.make_node("LayerNormalization", ["p", "g"], ["n"], name="norm", axis=-1),
        helper.make_node("Softmax", ["n"], ["y"], name="features", axis=-1),
    ]
    sharded, done = shard_model(after(*nodes, weights=weights), "allgather", 2, {})
    assert len(done) == 1
    kinds = [node.op_type for node in sharded.graph.node]
    assert kinds.count("DistCollective") == 2


def test_which_dim_counts_tokens() -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["o"], name="att")
    shape = ["B", 8, "S", 64]
    whole = model([node], dict.fromkeys("qkv", shape), {"o": shape})
    sharded, _ = shard_model(whole, "allgather", 2, {})
    assert read_sharding(sharded, Path("x")).axes == dict.fromkeys("qkvo", 2)
    fixed = [1, 8, 4096, 64]
    static = model([node], dict.fromkeys("qkv", fixed), {"o": fixed})
    for named in ({}, dict.fromkeys("qkv", 2)):
        sharded, _ = shard_model(static, "allgather", 2, named)
        assert sharded.graph.input[0].type.tensor_type.shape.dim[2].dim_param == "tokens"
    for wrong in ({"nothing": 0}, {"q": 4}):
        with pytest.raises(RejectedError, match="no dim"):
            shard_model(static, "allgather", 2, wrong)


def test_a_number_of_tokens_that_is_baked_in() -> None:
    shape = numpy_helper.from_array(np.array([512, 8, 64], np.int64), "shape")
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="bad")
    told = r"'bad' .Reshape. makes \[512, 8, 64\] of any number of tokens"
    with pytest.raises(RejectedError, match=told):
        shard_model(after(node, weights=[shape]), "allgather", 2, {"x": 0})
    fixed = helper.make_node("Add", ["x", "w"], ["y"], name="bad")
    weight = numpy_helper.from_array(np.ones((512, 8, 64), np.float16), "w")
    with pytest.raises(
        RejectedError, match=r"'bad' .Add. doesn't take every number of tokens"
    ) as caught:
        shard_model(after(fixed, weights=[weight]), "allgather", 2, {"x": 0})
    assert "dynamic number of tokens" in caught.value.fix


def test_causal_and_full_attention_in_one_model_count_keys_apart() -> None:
    nodes = [
        helper.make_node("Attention", ["q", "q", "q"], ["a"], name="first", is_causal=1),
        helper.make_node("Attention", ["a", "a", "a"], ["o"], name="second"),
    ]
    whole = model(nodes, {"q": HEADS_FIRST}, {"o": HEADS_FIRST})
    sharded, _ = shard_model(whole, "allgather", 2, {})
    assert [value.name for value in sharded.graph.input] == ["q", "causal_keys", "keys"]
    sharded, _ = shard_model(whole, "ulysses", 2, {})
    assert [value.name for value in sharded.graph.input] == ["q", "keys"]


def test_an_old_opset() -> None:
    old = attention("TRT_Attention")
    old.opset_import[0].version = 12
    with pytest.raises(RejectedError, match="uses opset 12; 13 is needed") as caught:
        shard_model(old, "allgather", 2, {})
    assert caught.value.fix == "export it again, with opset 17 or later"
