"""What ONNX Runtime's own optimizer makes of an exporter's model; and its operators one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.onnx.compare import compare  # noqa: E402
from mdattn_mpi.onnx.contrib.rewrite import write_out  # noqa: E402
from mdattn_mpi.onnx.model import operator  # noqa: E402
from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import read_sharding  # noqa: E402
from tests.support.onnx_encoder import HEADS, WIDTH, encoder  # noqa: E402
from tests.support.onnx_graph import INT64, graph, node  # noqa: E402

RANDOM = np.random.default_rng(5)
INT32, FLOAT16 = onnx.TensorProto.INT32, onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("kind", ["Attention", "MultiHeadAttention"])
def test_what_the_optimizer_fuses(kind: str, tmp_path: Path) -> None:
    optimizer = pytest.importorskip(
        "onnxruntime.transformers.optimizer", reason="needs what ONNX Runtime's optimizer imports"
    )
    from onnxruntime.transformers.fusion_options import FusionOptions

    onnx.save(encoder(), tmp_path / "plain.onnx")
    options = FusionOptions("bert")
    options.use_multi_head_attention = kind == "MultiHeadAttention"
    fused = optimizer.optimize_model(
        str(tmp_path / "plain.onnx"), "bert", HEADS, WIDTH, options, opt_level=0
    ).model
    kinds = [each.op_type for each in fused.graph.node if each.domain == "com.microsoft"]
    assert kinds.count(kind) == 2
    assert {"EmbedLayerNormalization", "SkipLayerNormalization", "BiasGelu"} <= {*kinds}
    for ranks, strategy in ((2, "allgather"), (3, "allgather"), (4, "ulysses")):
        sharded, _ = shard_model(fused, strategy, ranks, {})  # type: ignore[arg-type]
        assert all("::" not in operator(each) for each in sharded.graph.node)
        found = compare(fused, Path(), sharded, read_sharding(sharded, Path()))
        assert found.verdict == "right", found
        controls = [each.control for each in found.tensors if each.control is not None]
        assert len(controls) == 2
        assert max(each.error for each in found.tensors) < 1e-5 < 0.01 < min(controls)


TOKENS = 7
DATA = {"x": [1, "S", WIDTH], "y": [1, "S", WIDTH]}
IDS = {"ids": ([1, "S"], INT64)}
WEIGHTS = {name: RANDOM.standard_normal(WIDTH).astype(np.float32) for name in "abc"}
TABLES = {name: RANDOM.standard_normal((60, WIDTH)).astype(np.float32) for name in "wps"}
ANGLES = {name: RANDOM.standard_normal((60, 4)).astype(np.float32) for name in ("cos", "sin")}


class Case:
    """One operator: its inputs, how many outputs, and the model's other numbers."""

    def __init__(
        self, kind: str, inputs: str, outputs: str = "o", more: Any = None, **attributes: Any
    ) -> None:
        self.names = ["" if name == "-" else name for name in inputs.split()]
        self.outputs = ["" if name == "-" else name for name in outputs.split()]
        self.model = self._model(kind, more or {}, attributes)

    def _model(self, kind: str, more: dict[str, Any], attributes: dict[str, Any]) -> Any:
        plain = kind == "SimplifiedLayerNormalization"
        made = node(
            kind, self.names, self.outputs, domain="" if plain else "com.microsoft", **attributes
        )
        known = {**DATA, **IDS, **more}
        inputs = {name: known[name] for name in self.names if name in known}
        weights = {**WEIGHTS, **TABLES, **ANGLES}
        weights = {name: each for name, each in weights.items() if name in self.names}
        whole = graph([made], inputs, {}, weights, opset=17)
        whole.graph.output.extend(onnx.ValueInfoProto(name=n) for n in self.outputs if n)
        whole.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        return whole

    def inputs(self) -> dict[str, Any]:
        kinds = onnx.helper.tensor_dtype_to_np_dtype
        found = {}
        for value in self.model.graph.input:
            tensor = value.type.tensor_type
            shape = [dim.dim_value or TOKENS for dim in tensor.shape.dim]
            kind = kinds(tensor.elem_type)
            drawn = RANDOM.integers(0, 2, shape) if kind.kind == "i" else RANDOM.normal(0, 1, shape)
            found[value.name] = drawn.astype(kind)
        return found


CASES: dict[str, Callable[[], Case]] = {
    "a skip": lambda: Case("SkipLayerNormalization", "x y a b c", "o - - t", epsilon=1e-3),
    "a skip alone": lambda: Case("SkipLayerNormalization", "x y a"),
    "a simplified skip": lambda: Case("SkipSimplifiedLayerNormalization", "x y a c", "o - - t"),
    "a simplified norm": lambda: Case("SimplifiedLayerNormalization", "x a", epsilon=1e-2, axis=-1),
    "embeddings": lambda: Case(
        "EmbedLayerNormalization",
        "ids kinds w p s a b mask",
        "o count t",
        {"kinds": ([1, "S"], INT32), "mask": ([1, "S"], INT32), "ids": ([1, "S"], INT32)},
    ),
    "embeddings of places": lambda: Case(
        "EmbedLayerNormalization",
        "ids - w p - a b - places",
        "o -",
        {"places": ([1, "S"], INT32), "ids": ([1, "S"], INT32)},
    ),
    "a bias": lambda: Case("BiasGelu", "x a"),
    "gelu": lambda: Case("Gelu", "x"),
    "fast": lambda: Case("FastGelu", "x a"),
    "quick": lambda: Case("QuickGelu", "x", alpha=1.3),
    "a product": lambda: Case("FusedMatMul", "x y", transB=1, alpha=0.3),
    "turned": lambda: Case("RotaryEmbedding", "x ids cos sin"),
    "pairs turned": lambda: Case("RotaryEmbedding", "x ids cos sin", interleaved=1),
    "a part turned": lambda: Case(
        "RotaryEmbedding", "x ids cos sin", num_heads=2, rotary_embedding_dim=8
    ),
    "heads turned, from one on": lambda: Case(
        "RotaryEmbedding", "h first cos sin", "o",
        {"h": [1, 4, "S", 8], "first": ([1], INT64)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str) -> None:
    """Written out they give what ONNX Runtime gives."""
    case = CASES[name]()
    inputs, wanted = case.inputs(), [name for name in case.outputs if name]
    expected = run(case.model, inputs, wanted)
    (line,) = write_out(case.model)
    assert line.startswith("1 nodes of ONNX Runtime's own")
    assert all("::" not in operator(each) for each in case.model.graph.node)
    for ours, theirs in zip(run(case.model, inputs, wanted), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.abs(theirs).max() > 0.1
        assert np.abs(ours - theirs).max() < 5e-5


def run(model: Any, inputs: dict[str, Any], wanted: list[str]) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(wanted, inputs)


def test_float16_is_computed_in_float32() -> None:
    """A square of 300 is beyond float16; its norm isn't."""
    case = Case("SimplifiedLayerNormalization", "x a", axis=-1)
    model = case.model
    model.graph.input[0].type.tensor_type.elem_type = FLOAT16
    (gain,) = model.graph.initializer
    gain.CopyFrom(onnx.numpy_helper.from_array(np.ones(WIDTH, np.float16), "a"))
    write_out(model)
    data = np.full((1, 3, WIDTH), 300, np.float16)
    (found,) = run(model, {"x": data}, ["o"])
    assert found.dtype == np.float16
    assert np.allclose(found, 1)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (lambda: Case("SkipLayerNormalization", "x y a", "o mean"), "gives its mean"),
        (lambda: Case("FusedMatMul", "x y", transBatchA=1), "turns its batch"),
        (lambda: Case("RotaryEmbedding", "x ids cos sin", scale=2.0), "has a scale"),
    ],
)
def test_what_is_refused(case: Callable[[], Case], why: str) -> None:
    with pytest.raises(RejectedError, match=f"node 'o' .*{why}"):
        write_out(case().model)
