"""`mdattn run --model MODEL.onnx` on real ranks: the whole model's outputs, a job's promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.devices.presence import gpu_count
from tests.support.mpirun import mpirun

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from tests.support.onnx_job import LENGTHS, MODELS, random_items, whole_output  # noqa: E402
from tests.support.onnx_roberta import PADDING, WORDS, roberta  # noqa: E402


def prepare(folder: Path, kind: str) -> Any:
    """Write ``model.onnx`` and ``data.h5``; return the model."""
    model = MODELS[kind]()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with h5py.File(folder / "data.h5", "w") as file:
        for number, arrays in enumerate(random_items(model)):
            for name, array in arrays.items():
                file[f"items/s{number}/{name}"] = array
    return model


def run(folder: Path, *options: str, ranks: int = 3) -> Any:
    files = [f"{folder}/data.h5", "--model", f"{folder}/model.onnx", "-o", f"{folder}/out.h5"]
    return mpirun(ranks, ["-m", "mdattn_mpi", "run", *files, *options])


def compare(folder: Path, model: Any, tolerance: float, ranks: int) -> None:
    """As the whole one; and every rank's tokens alone are seen to give something else."""
    with h5py.File(folder / "data.h5") as data, h5py.File(folder / "out.h5") as out:
        for number, tokens in enumerate(LENGTHS):
            inputs = {name: array[()] for name, array in data[f"items/s{number}"].items()}
            whole = whole_output(model, inputs)
            found = out[f"items/s{number}/out"][()].reshape(whole.shape)
            size = max(1.0, float(np.abs(whole).max()))
            assert np.abs(found - whole).max() < tolerance * size
            if tokens > ranks:
                cuts = range(0, tokens, -(-tokens // ranks))
                alone = [
                    whole_output(model, {n: a[:, c : c + cuts.step] for n, a in inputs.items()})
                    for c in cuts
                ]
                assert np.abs(np.concatenate(alone, 1) - whole).max() > max(
                    0.1, 2 * tolerance * size
                )


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_on_three_ranks(kind: str, tmp_path: Path) -> None:
    model = prepare(tmp_path, kind)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    compare(tmp_path, model, 2e-4, 3)
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
    assert "has its data in 'weights.bin', which isn't there" in " ".join(lost.stderr.split())


@pytest.mark.skipif(gpu_count() < 2, reason="needs two GPUs, and an ONNX Runtime with CUDA")
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_on_two_gpus(kind: str, tmp_path: Path) -> None:
    model = prepare(tmp_path, kind)
    done = run(tmp_path, "-b", "cuda", "--dtype", "fp16", ranks=2)
    assert done.returncode == 0, done.stderr
    compare(tmp_path, model, 5e-2, 2)


def test_an_item_with_padding(tmp_path: Path) -> None:
    """It is told and left out: this model would give its tokens other positions."""
    model = roberta()
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    ids = np.random.default_rng().choice(WORDS, (2, 1, 31))
    ids[1, 0, 20] = PADDING  # rank 1's
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for number in range(2):
            file[f"items/s{number}/ids"] = ids[number]
    done = run(tmp_path, ranks=2)
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stderr.split())
    assert "item 's1', rank 1: ids holds 3, which is padding to this model, within tokens" in said
    with h5py.File(tmp_path / "out.h5") as out:
        whole = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"ids": ids[0]})
        assert np.abs(out["items/s0/o"][()].reshape(whole[0].shape) - whole[0]).max() < 1e-4


def test_what_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path, "decoder")
    for options, told in (
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
