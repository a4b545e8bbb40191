"""`mdattn run --model MODEL.onnx` on real ranks: the whole model's outputs, a job's promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.support.mpirun import mpirun

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from tests.support.onnx_decoder import HEADS, decoder  # noqa: E402
from tests.support.onnx_graph import graph, node  # noqa: E402

LENGTHS = (61, 17, 1)  # the last leaves ranks without tokens
WINDOW = 5


def joined() -> Any:
    """An attention of 3-D inputs, heads in the last dim, values of another head dim."""
    shapes = {"q": [1, "S", HEADS * 8], "k": [1, "S", 2 * 8], "v": [1, "S", 2 * 16]}
    heads = {"q_num_heads": HEADS, "kv_num_heads": 2}
    attend = node("Attention", "qkv", "o", is_causal=1, scale=0.5, **heads)
    return graph([attend, node("Neg", "o", ["out"])], shapes, {"out": [1, "S", HEADS * 16]})


MODELS = {"decoder": lambda: decoder(window=WINDOW), "joined": joined}


def prepare(folder: Path, kind: str) -> Any:
    """Write ``model.onnx`` and ``data.h5``; return the model."""
    model = MODELS[kind]()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    random = np.random.default_rng()
    with h5py.File(folder / "data.h5", "w") as file:
        for number, tokens in enumerate(LENGTHS):
            for value in model.graph.input:
                width = [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:]
                array = (
                    random.standard_normal((1, tokens, *width)).astype(np.float32)
                    if width
                    else random.integers(0, 50, (1, tokens))
                )
                file[f"items/s{number}/{value.name}"] = array
    return model


def outputs(model: Any, inputs: dict[str, Any]) -> Any:
    """Run the whole model."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["out"], inputs)[0]


def run(folder: Path, *options: str, ranks: int = 3) -> Any:
    files = [f"{folder}/data.h5", "--model", f"{folder}/model.onnx", "-o", f"{folder}/out.h5"]
    return mpirun(ranks, ["-m", "mdattn_mpi", "run", *files, *options])


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_on_three_ranks(kind: str, tmp_path: Path) -> None:
    """As the whole one; and every rank's tokens alone are seen to give something else."""
    model = prepare(tmp_path, kind)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    with h5py.File(tmp_path / "data.h5") as data, h5py.File(tmp_path / "out.h5") as out:
        for number, tokens in enumerate(LENGTHS):
            inputs = {name: array[()] for name, array in data[f"items/s{number}"].items()}
            whole = outputs(model, inputs)
            found = out[f"items/s{number}/out"][()].reshape(whole.shape)
            size = max(1.0, float(np.abs(whole).max()))
            assert np.abs(found - whole).max() < 2e-4 * size
            if tokens > 3:
                cuts = range(0, tokens, -(-tokens // 3))
                alone = [
                    outputs(model, {n: a[:, c : c + cuts.step] for n, a in inputs.items()})
                    for c in cuts
                ]
                assert np.abs(np.concatenate(alone, 1) - whole).max() > 0.1
    again = run(tmp_path, ranks=2)
    assert again.returncode == 2  # other ranks would write other bytes
    assert "ranks" in again.stderr
    again = run(tmp_path)
    assert again.returncode == 0
    assert "3 of 3 items done, none of them now" in again.stderr
    assert "backend" not in again.stderr  # nothing was opened
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    again = run(tmp_path)
    assert again.returncode == 0
    assert "3 of 3 items done, none of them now" in again.stderr
    assert "backend" in again.stderr  # it might have been another model


def test_weights_in_a_file_of_their_own_are_part_of_the_model(tmp_path: Path) -> None:
    model = prepare(tmp_path, "decoder")
    weights = tmp_path / "weights.bin"
    onnx.save(
        model, str(tmp_path / "model.onnx"), save_as_external_data=True, location=weights.name
    )
    assert run(tmp_path, ranks=2).returncode == 0
    again = run(tmp_path, ranks=2)
    assert again.returncode == 0
    assert "backend" not in again.stderr  # nothing was opened
    weights.write_bytes(weights.read_bytes()[::-1])
    other = run(tmp_path, ranks=2)
    assert other.returncode == 2
    assert "engine_sha256" in other.stderr
    weights.unlink()
    lost = run(tmp_path, ranks=2)
    assert lost.returncode == 2
    assert str(weights) in "".join(lost.stderr.split())


def test_what_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path, "decoder")
    for options, told in (
        (["-b", "cuda"], "its segments run on CPUs"),
        (["--lse"], "--lse with --model"),
        (["--bind", "ids=items/*/words", "--bind", "out=items/*/out"], "matches nothing"),
    ):
        done = run(tmp_path, *options, ranks=2)
        assert done.returncode == 2
        assert told in " ".join(done.stderr.split())
    (tmp_path / "model.onnx").write_text("junk")
    done = run(tmp_path, ranks=2)
    assert done.returncode == 2
    assert "not an ONNX file" in done.stderr
