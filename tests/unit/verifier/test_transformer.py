"""``mdattn verify --model``: right passes; zeros, other models, rank-local attention don't."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra transformers")
pytest.importorskip("torch", reason="needs the extra transformers")

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import DatasetWriter, create_output, open_output, open_tokens
from mdattn_mpi.models.folder import open_folder
from mdattn_mpi.problem import ModelProblem, Span, TensorSpec
from mdattn_mpi.verifier.transformer import OneProcess
from tests.support.complaint import complaint
from tests.support.tiny_models import random_ids, tiny_model

Capture = pytest.CaptureFixture[str]
Arrays = dict[str, Any]
LENGTHS = {"a": (47, [0]), "packed": (61, [0, 20, 41]), "long": (93, [0])}


class Files(NamedTuple):
    data: Path
    output: Path
    model: Path

    def verify(self, *options: str) -> int:
        command = ["verify", str(self.output), "--data", str(self.data), "--model"]
        model = [] if "--model" in options else [str(self.model)]
        return main([*command, *model, *(option for option in options if option != "--model")])


def whole(model: OneProcess, ids: Any, starts: list[int]) -> Arrays:
    """What a model gives, document by document, as an output has it."""
    parts = [model.run(part) for part in np.split(ids, starts[1:])]
    hidden = [part["last_hidden_state"] for part in parts]
    found = {
        "last_hidden_state": np.concatenate(hidden).astype(ml_dtypes.bfloat16),
        "embedding": np.stack([part.mean(0) for part in hidden]).astype(np.float32),
    }
    if "logprobs" in parts[0]:
        each = np.concatenate([part["logprobs"] for part in parts])
        found["logprobs"] = each.astype(np.float32)
        found["logprobs_sum"] = np.array([each.sum()])
        found["perplexity"] = np.exp([-each.sum() / (len(ids) - len(starts))])
    return found


def rank_local(model: OneProcess, ids: Any, starts: list[int]) -> Arrays:
    """The same where attention never leaves a rank: halves as if they were documents."""
    found = whole(model, ids, sorted({*starts, len(ids) // 2}))
    found["embedding"] = whole(model, ids, starts)["embedding"]
    return found


def zeros(model: OneProcess, ids: Any, starts: list[int]) -> Arrays:
    return {name: np.zeros_like(array) for name, array in whole(model, ids, starts).items()}


def problem_of(arrays: Arrays, tokens: int) -> ModelProblem:
    return ModelProblem(
        tokens,
        tuple(
            TensorSpec(name, array.shape, array.dtype.name, 0 if len(array) == tokens else None)
            for name, array in arrays.items()
        ),
    )


def make(folder: Path, family: str, made: Callable[..., Arrays] = whole, seed: int = 0) -> Files:
    """Write token ids, and an output of two ranks as the model of `seed` and `made` give it."""
    files = Files(folder / "tokens.h5", folder / "out.h5", tiny_model(family))
    head = family not in ("bert", "modernbert", "esm", "roberta")
    model = OneProcess(open_folder(tiny_model(family, seed)), "bfloat16", "cpu", head=head)
    with DatasetWriter(files.data) as writer:
        for number, (name, (tokens, starts)) in enumerate(LENGTHS.items()):
            segments = starts if len(starts) > 1 else None
            writer.add_tokens(name, random_ids(tokens, number).numpy(), segments)
    with open_tokens(files.data) as data:
        given = {i.name: made(model, data.ids(i), data.starts(i).tolist()) for i in data.items}
        digest = data.digest

    def problem(tokens: int, documents: int) -> ModelProblem:
        (name,) = (name for name, (length, _) in LENGTHS.items() if length == tokens)
        return problem_of(given[name], tokens)

    with open_tokens(files.data, problem) as data:
        attributes = {
            **{"input_digest": digest, "model": open_folder(files.model).digest, "items": "*"},
            **{"dtype": "bf16", "pool": "mean", "give": ",".join(given["a"])},
        }
        create_output(files.output, data.items, ranks=2, attributes=attributes)
    with open_output(files.output, writable=True) as output:
        for item in output.items:
            tokens = item.problem.work
            shards = [(Span(0, tokens // 2),), (Span(tokens // 2, tokens),)]
            crc32s = []
            for rank, spans in enumerate(shards):
                arrays = {
                    tensor.name: given[item.name][tensor.name]
                    for tensor in item.problem.outputs  # type: ignore[union-attr]
                    if tensor.token_dim is not None or rank == 0
                }
                own = {
                    name: array[spans[0].slice] if len(array) == tokens else array
                    for name, array in arrays.items()
                }
                crc32s.append(output.write(item, spans, own))
            output.ledger.commit(item, crc32s, "allgather", shards)
    return files


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "roberta", "modernbert"])
def test_right(tmp_path: Path, family: str, capsys: Capture) -> None:
    files = make(tmp_path, family)
    assert files.verify("--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["right"], facts["wrong"]) == (3, 0)
    assert {item["item"]: item["tokens"] for item in facts["items"]} == {
        name: tokens for name, (tokens, _) in LENGTHS.items()
    }
    for item in facts["items"]:
        assert item["ranks"] == 2
        assert {"last_hidden_state", "embedding"} <= item["errors"].keys()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("made", [zeros, rank_local])
def test_wrong(tmp_path: Path, family: str, made: Any, capsys: Capture) -> None:
    files = make(tmp_path, family, made)
    assert files.verify() == 1
    printed = capsys.readouterr()
    assert "3 items, 3 wrong" in printed.out
    assert len(re.findall(r"last_hidden_state: error .* times what is allowed", printed.out)) == 3


def test_another_model(tmp_path: Path, capsys: Capture) -> None:
    files = make(tmp_path, "llama", seed=1)
    assert files.verify() == 1
    assert "3 items, 3 wrong" in capsys.readouterr().out


def test_another_folder_is_refused(tmp_path: Path, capsys: Capture) -> None:
    files = make(tmp_path, "llama")
    assert files.verify("--model", str(tiny_model("llama", 1))) == 2
    assert "is not the model" in complaint(capsys)
    assert files.verify("--model", str(tiny_model("llama", 1)), "--other-data") == 1


def test_prefixes_of_long_items_where_the_model_is_causal(tmp_path: Path, capsys: Capture) -> None:
    files = make(tmp_path, "llama")
    assert files.verify("--tokens", "30") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "compared up to token 30 of 93 only: --tokens 93 would compare all" in printed
    assert "only tokens of rank 0 were compared: --tokens 93" in printed


def test_prefixes_tell_nothing_where_it_is_not(tmp_path: Path, capsys: Capture) -> None:
    files = make(tmp_path, "bert")
    assert files.verify("--tokens", "30") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 1 documents of more than 30 tokens not compared" in printed
    assert "3 items, 1 right, 2 not judged" in printed


def test_what_is_not_drawn_is_compared_with_its_checksum(tmp_path: Path, capsys: Capture) -> None:
    files = make(tmp_path, "llama")
    assert files.verify("--sample", "1") == 0
    assert "3 items, 1 right, 2 by checksum" in capsys.readouterr().out
    with open_output(files.output) as output:
        offset = output.regions(output.items[2])["last_hidden_state"].offset
    with files.output.open("r+b") as file:
        file.seek(offset + 101)
        file.write(b"\x55")
    assert files.verify("--sample", "1") == 1
    assert "the shard of rank 0 has other bytes" in capsys.readouterr().out


def test_sums_that_are_not_those_of_the_logprobs(tmp_path: Path, capsys: Capture) -> None:
    def made(*about: Any) -> Arrays:
        found = whole(*about)
        return {**found, "logprobs_sum": found["logprobs_sum"] * 1.001}

    assert make(tmp_path, "llama", made).verify() == 1
    assert re.search(
        r"logprobs_sum is -\d.*; the logprobs give -\d", " ".join(capsys.readouterr().out.split())
    )


def test_pooling(tmp_path: Path, capsys: Capture) -> None:
    def made(*about: Any) -> Arrays:
        found = whole(*about)
        return {**found, "embedding": found["embedding"] * 0.8}

    assert make(tmp_path, "llama", made).verify() == 1
    assert "embedding: error" in " ".join(capsys.readouterr().out.split())


def test_options_of_the_other_kind(tmp_path: Path, capsys: Capture) -> None:
    files = make(tmp_path, "llama")
    assert files.verify("--rows", "3") == 2
    assert "--rows with --model. Fix: leave --rows out" in complaint(capsys)
    assert main(["verify", str(files.output), "--data", str(files.data)]) == 2
    assert "holds what a model gave. Fix: name the model: --model DIR" in complaint(capsys)
