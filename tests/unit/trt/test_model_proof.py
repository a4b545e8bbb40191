"""A model's engine against ONNX Runtime: the proof passes what is right, and fails on all else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.onnx.known import KnownRun
from mdattn_mpi.onnx.sharding import Sharding
from mdattn_mpi.partition import equal_shards
from mdattn_mpi.trt.library import Library
from mdattn_mpi.trt.model_proof import conclude_model, judge_model
from mdattn_mpi.trt.onnx_import import known_of
from mdattn_mpi.trt.store import describe, read_known, sha256_of, write_engine

RANKS, TOKENS = 3, 47
RTX = Library("tensorrt_rtx", "1.7.1", None)
SHARDING = Sharding("allgather", RANKS, {"x": 1, "o": 1})
MANIFEST = describe(b"engine", RTX, (8, 6), SHARDING)
RANDOM = np.random.default_rng(2)


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def known(control: float = 0.3) -> KnownRun:
    """A run in which each rank's own tokens alone make that much of a difference."""
    right = normal(1, TOKENS, 8)
    alone = right + control * normal(1, TOKENS, 8)
    return KnownRun(TOKENS, {"x": normal(1, TOKENS, 8)}, {"o": right}, {"o": alone})


def verdicts(run: KnownRun, found: Any) -> list[Any]:
    shards = equal_shards(TOKENS, RANKS)
    return [
        judge_model(run, MANIFEST, rank, {"o": found[:, span.start : span.stop]})
        for rank, span in enumerate(shards)
    ]


def test_rounding_passes() -> None:
    run = known()
    found = (run.outputs["o"] * (1 + 2e-3 * normal(1, TOKENS, 8))).astype(np.float16)
    said = conclude_model(MANIFEST, verdicts(run, found))
    assert said.startswith("proven against ONNX Runtime (error 2")
    assert "own tokens alone 3" in said


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda run: np.zeros((1, TOKENS, 8)), "zeros"),
        (lambda run: run.alone["o"], "what its own tokens alone would make"),
        (lambda run: np.full((1, TOKENS, 8), np.nan), "NaN in every row"),
        (lambda run: np.where(run.outputs["o"] > 2, np.inf, run.outputs["o"]), "aren't finite"),
        (lambda run: run.outputs["o"][:, ::-1], "other numbers"),
        (lambda run: run.outputs["o"] * 1.1, "other numbers"),
    ],
)
def test_what_is_wrong_is_named(wrong: Any, told: str) -> None:
    run = known()
    with pytest.raises(DeviceError, match=f"tensorrt_rtx 1.7.1 computes .*{told}") as caught:
        conclude_model(MANIFEST, verdicts(run, wrong(run)))
    assert "3 of 3 ranks" in str(caught.value) or "finite" in told
    assert "mdattn shard -s" in caught.value.fix


def test_a_small_control_is_no_excuse() -> None:
    """Half of what is missed without the exchange is seen, although it is within the rounding."""
    run = known(control=0.06)
    found = (run.outputs["o"] + run.alone["o"]) / 2
    with pytest.raises(DeviceError, match=r"other numbers|own tokens"):
        conclude_model(MANIFEST, verdicts(run, found))


def test_where_the_control_is_faint_that_is_said() -> None:
    run = known(control=1e-3)
    said = conclude_model(MANIFEST, verdicts(run, run.alone["o"]))
    assert "so would each rank's own tokens alone be" in said


def test_what_is_kept_is_what_is_read(tmp_path: Path) -> None:
    run = known()
    data, path = run.to_bytes(), tmp_path / "m.engine"
    write_engine(path, b"engine", replace(MANIFEST, known=sha256_of(data)), data)
    again = KnownRun.from_bytes(read_known(path, replace(MANIFEST, known=sha256_of(data))), path)
    assert again.tokens == TOKENS
    assert all(np.array_equal(again.outputs[name], run.outputs[name]) for name in run.outputs)
    assert read_known(path, MANIFEST) == b""
    with pytest.raises(RejectedError, match="isn't what the engine was to give"):
        read_known(path, replace(MANIFEST, known=sha256_of(b"other")))
    with pytest.raises(RejectedError, match="not what a model gives for known inputs"):
        KnownRun.from_bytes(b"junk", path)


def test_known_of_a_model_in_float16() -> None:
    """ONNX Runtime has it in float32, from the weights in float16; too long a one isn't run."""
    pytest.importorskip("onnx", reason="the package onnx isn't installed")
    pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")
    from mdattn_mpi.onnx.shard import shard_model
    from mdattn_mpi.onnx.sharding import read_sharding
    from tests.support.model_job import model

    sharded, _ = shard_model(model(), "allgather", 2, {})
    sharding = read_sharding(sharded, Path())
    data, why = known_of(sharded, Path("m.onnx"), sharding, (1, 4096))
    run = KnownRun.from_bytes(data, Path())
    assert (run.tokens, why) == (31, "")
    assert {array.dtype.name for array in (*run.inputs.values(), *run.outputs.values())} == {
        "float32"
    }
    first, second = (np.array_equal(run.outputs["output"][part], run.alone["output"][part])
                     for part in (slice(0, 16), slice(16, 31)))  # fmt: skip
    assert (first, second) == (True, False)  # it is causal
    ring = replace(sharding, strategy="ring")
    data, why = known_of(sharded, Path(), ring, (1 << 20, 1 << 20))
    assert (data, "too long to compute here" in why) == (b"", True)
