"""Which engine of a model is taken from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")

from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import Sharding  # noqa: E402
from mdattn_mpi.trt import onnx_import  # noqa: E402
from mdattn_mpi.trt.build import BuiltEngine  # noqa: E402
from mdattn_mpi.trt.library import Library  # noqa: E402
from mdattn_mpi.trt.store import Cache, describe  # noqa: E402
from tests.support.onnx_decoder import decoder  # noqa: E402

RTX, SM = Library("tensorrt_rtx", "1.7.1", None), (8, 6)


def test_a_sharded_model_whose_weights_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in a file of their own: the model itself is the same, byte for byte."""
    built: list[bytes] = []

    def build(*_: Any) -> BuiltEngine:
        built.append(b"engine %d" % len(built))
        manifest = describe(built[-1], RTX, SM, Sharding("allgather", 2, {"ids": 1, "out": 1}))
        return BuiltEngine(built[-1], manifest)

    monkeypatch.setattr(onnx_import, "build_model", build)
    path, weights = tmp_path / "sharded.onnx", tmp_path / "weights.bin"
    sharded, _ = shard_model(decoder(), "allgather", 2, {}, "float16")
    outside = {"save_as_external_data": True, "location": weights.name, "size_threshold": 16}
    onnx.save(sharded, str(path), **outside)

    def engine() -> bytes:
        cache = Cache(tmp_path / "cache")
        made = onnx_import.make_model(RTX, path, 2, "auto", "float16", 64, SM, cache)
        return bytes(made.engine)

    assert [engine(), engine()] == [b"engine 0", b"engine 0"]
    data = bytearray(weights.read_bytes())
    data[40] ^= 1
    weights.write_bytes(data)
    assert [engine(), engine()] == [b"engine 1", b"engine 1"]
