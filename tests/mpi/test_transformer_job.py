"""`mdattn run --model` on real ranks: values, resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

from tests.support.mpirun import mpirun
from tests.support.storm import done, results
from tests.support.tiny_models import hidden_state, tiny_model

if TYPE_CHECKING:
    from subprocess import CompletedProcess

torch = pytest.importorskip("torch", reason="needs the extra transformers")
transformers = pytest.importorskip("transformers", reason="needs the extra transformers")

LENGTHS = (31, 2, 47, 1, 20)
ALL = ("--give", "last_hidden_state,embedding,logprobs")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.h5"
    random = np.random.default_rng()
    with h5py.File(path, "w") as file:
        for number, tokens in enumerate(LENGTHS):
            ids = random.integers(8, 96, tokens)
            file[f"items/item{number}/input_ids"] = ids.astype(("i4", "i8", "u2", "u4")[number % 4])
    return path


def command(data: Path, family: str, *options: str) -> list[str]:
    files = [str(data), "-o", str(data.with_name("out.h5")), "--model", str(tiny_model(family))]
    return ["-m", "mdattn_mpi", "run", *files, "-b", "cpu", *options]


def run(data: Path, family: str, *options: str, ranks: int = 2) -> CompletedProcess[str]:
    return mpirun(ranks, command(data, family, *options), env={"OMP_NUM_THREADS": "1"})


def distance(found: Any, right: Any) -> float:
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def items_of(data: Path) -> list[tuple[Any, Any]]:
    """Each item's ids, and what came out of it."""
    with h5py.File(data) as file, h5py.File(data.with_name("out.h5")) as output:
        return [
            (
                file[f"items/item{number}/input_ids"][:].astype(np.int64),
                {name: tensor[:] for name, tensor in output[f"items/item{number}"].items()},
            )
            for number in range(len(LENGTHS))
        ]


def logprobs_of(folder: Path, ids: Any) -> Any:
    """In one process, float32, by its definition."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        every = model.eval()(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1).numpy()
    return np.append(0.0, every[np.arange(len(ids) - 1), ids[1:]])


def test_a_causal_model_gives_states_embeddings_and_logprobs(data: Path) -> None:
    job = run(data, "llama", *ALL, ranks=3)
    assert job.returncode == 0, job.stderr
    assert f"{len(LENGTHS)} of {len(LENGTHS)} items done" in job.stderr
    folder = tiny_model("llama")
    for ids, out in items_of(data):
        right = hidden_state(folder, ids).numpy()
        assert distance(out["last_hidden_state"], right) < 0.03
        assert distance(out["embedding"], right.mean(0)) < 0.03
        told = logprobs_of(folder, ids)
        assert np.abs(out["logprobs"] - told).max() < 0.3
        assert out["logprobs"][0] == 0
        assert len(ids) == 1 or np.abs(told[1:]).min() > 0
        assert out["logprobs_sum"] == pytest.approx(out["logprobs"].sum(dtype=float), rel=1e-6)
        each = out["logprobs_sum"] / max(1, len(ids) - 1)
        assert out["perplexity"] == pytest.approx(np.exp(-each))


def test_an_encoder_is_pooled_as_asked(data: Path) -> None:
    options = ("--give", "embedding", "--pool", "last", "--dtype", "fp16")
    job = run(data, "bert", *options)
    assert job.returncode == 0, job.stderr
    for ids, out in items_of(data):
        assert set(out) == {"embedding"}
        assert distance(out["embedding"], hidden_state(tiny_model("bert"), ids)[-1]) < 0.01
    again = run(data, "bert", *options)
    assert again.returncode == 0
    assert f"{len(LENGTHS)} items done, none of them now" in again.stderr
    assert "backend" in job.stderr
    assert "backend" not in again.stderr  # nothing was opened


def test_ids_beyond_the_vocabulary_fail_their_item_alone(data: Path) -> None:
    with h5py.File(data, "r+") as file:
        file["items/item2/input_ids"][40] = 96
        file["items/item1/input_ids"][1] = -5
    job = run(data, "llama")
    assert job.returncode == 1
    words = " ".join(job.stderr.split())
    assert "input_ids[40] is 96: the model's vocabulary has ids from 0 to 95" in words
    assert "input_ids[1] is -5" in words
    assert "failed: item1, item2" in words or "failed: item2, item1" in words
    assert done(data.with_name("out.h5")) == 3


@pytest.mark.timeout(300)  # four jobs, each of which imports PyTorch on every rank
def test_a_killed_job_goes_on_to_the_same_bytes(data: Path) -> None:
    out = data.with_name("out.h5")
    killed = run(data, "llama", *ALL, "--chaos", "kill@enqueue:item4:1")
    assert killed.returncode != 0
    left = done(out)
    assert left < len(LENGTHS)
    again = run(data, "llama", *ALL)
    assert again.returncode == 0, again.stderr
    resumed = results(out)
    assert run(data, "llama", *ALL, "--overwrite").returncode == 0
    assert results(out) == resumed


def test_what_can_not_be_is_refused_before_any_work(data: Path) -> None:
    with h5py.File(data, "r+") as file:
        file["items/long/input_ids"] = np.full(600, 9)
    refused = run(data, "llama", ranks=1)
    assert refused.returncode == 2
    words = " ".join(refused.stderr.split())
    assert f"{data}, item 'long'" in words
    assert "600 tokens; LlamaModel has positions for 512" in words
    assert not data.with_name("out.h5").exists()
    beyond = run(data, "llama", "--beyond-positions", "--dry-run", ranks=1)
    assert beyond.returncode == 0, beyond.stderr
    assert "proof: 7 places of 49 random tokens on 1 rank" in beyond.stderr
    assert not data.with_name("out.h5").exists()
