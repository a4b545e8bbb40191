"""``mdattn inspect``: what a file holds, for people and for programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.cli import inspect, main
from mdattn_mpi.dataset import DatasetWriter, open_output
from mdattn_mpi.problem import AttentionProblem
from tests.support.complaint import complaint
from tests.support.dataset_files import FLOAT16, How, random_tensors, write_dataset
from tests.support.finished import finished

SHAPE = "37 query and 23 kv tokens, 4 query and 2 kv heads of 16 (value 24)"

Capture = pytest.CaptureFixture[str]


def facts(path: Path, capsys: Capture, *options: str, code: int = 0) -> dict[str, Any]:
    """What `--json` prints."""
    assert main(["inspect", str(path), "--json", *options]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def text(path: Path, capsys: Capture, *options: str, code: int = 0) -> str:
    """What people see."""
    assert main(["inspect", str(path), *options]) == code
    return capsys.readouterr().out


def test_a_dataset(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "d.h5"
    items = {"a": random_tensors(), "b": random_tensors(batch=(2,))}
    how = How("uint16", "head_major", {"chunks": True, "compression": "gzip"})
    write_dataset(path, items, how, {"a": {"causal": "upper_left"}})
    found = facts(path, capsys)
    assert found["format"] == "mdattn-dataset"
    assert [item["name"] for item in found["items"]] == ["a", "b.0", "b.1"]
    assert found["items"][0]["q_tokens"] == 37
    assert found["items"][0]["causal"] == "upper_left"
    query = found["items"][0]["tensors"]["query"]
    assert (query["shape"], query["layout"], query["encoding"]) == (
        [4, 37, 16],
        "head_major",
        "uint16",
    )
    shown = text(path, capsys)
    for word in ("3 items", SHAPE, "upper_left, head-major", "gzip", "as uint16"):
        assert word in shown
    assert "several times slower" in shown
    assert [item["name"] for item in facts(path, capsys, "--items", "b*")["items"]] == [
        "b.0",
        "b.1",
    ]


def test_bad_items_are_listed_with_the_good(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "d.h5"
    items = {name: random_tensors() for name in ("a", "b", "c")}
    write_dataset(path, items, None, {"b": {"scale": -1.0}, "c": {"causal": "no"}})
    found = facts(path, capsys, code=1)
    assert [item["name"] for item in found["items"]] == ["a"]
    assert [fault["item"] for fault in found["faults"]] == ["b", "c"]
    shown = text(path, capsys, code=1)
    assert "bad: b: scale is -1.0" in shown
    assert "Fix: use none, upper_left or lower_right" in shown
    assert main(["inspect", str(path), "--items", "a"]) == 0


def test_checksums_of_a_dataset(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "d.h5"
    assert main(["make-data", str(path), "--length", "50", "--items", "3", "--quiet"]) == 0
    assert all(item["damaged"] == [] for item in facts(path, capsys, "--check")["items"])
    with h5py.File(path) as file:
        offset = file["items/item1/key"].id.get_offset()
    with open(path, "r+b") as raw:
        os.pwrite(raw.fileno(), b"\x01", offset + 77)
    found = facts(path, capsys, "--check", code=1)
    assert [item["damaged"] for item in found["items"]] == [[], ["key"], []]
    shown = text(path, capsys, "--check", code=1)
    assert "damaged: item1: key" in shown
    assert "checked: 1 of 3 items damaged" in shown
    assert main(["inspect", str(path)]) == 0


def test_an_output(tmp_path: Path, capsys: Capture) -> None:
    problem = AttentionProblem(40, 30, 2, 1, 16, 16)
    files = finished(tmp_path, {"a": problem, "b": problem, "c": problem}, ranks=3, lse=True)
    with open_output(files.output, writable=True) as output:
        output.ledger.fail(output.item("b"), "query holds nan\x1b[2J at token 3")
    found = facts(files.output, capsys, code=1)
    assert found["counts"] == {"done": 2, "failed": 1, "todo": 0}
    assert [item["state"] for item in found["items"]] == ["done", "failed", "done"]
    assert found["items"][0]["strategy"] == "ring"
    assert found["attributes"]["backend"] == "cpu"
    shown = text(files.output, capsys, code=1)
    assert "failed: b: query holds nan" in shown
    assert "\x1b" not in shown
    assert "ring, 3 ranks" in shown
    assert "2 done, 1 failed, 0 todo" in shown


def test_checksums_of_an_output(tmp_path: Path, capsys: Capture) -> None:
    problem = AttentionProblem(40, 30, 2, 1, 16, 16)
    files = finished(tmp_path, {"a": problem, "b": problem}, ranks=4)
    assert not any(item["damaged"] for item in facts(files.output, capsys, "--check")["items"])
    with h5py.File(files.output) as file:
        offset = file["items/b/output"].id.get_offset()
    with open(files.output, "r+b") as raw:
        os.pwrite(raw.fileno(), b"\xff" * 200, offset + 15 * 64)
    found = facts(files.output, capsys, "--check", code=1)
    assert found["items"][0]["damaged"] == []
    assert "the shard of rank 1" in found["items"][1]["damaged"]
    assert "the shard of rank 0" not in found["items"][1]["damaged"]


def test_somebody_elses_files(tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "a.npz", q2=np.zeros((3, 4, 5), np.float32), q10=np.zeros(2), n=[1])
    found = facts(tmp_path / "a.npz", capsys)
    assert [tensor["name"] for tensor in found["tensors"]] == ["q2", "q10"]
    assert found["tensors"][0] == {"name": "q2", "shape": [3, 4, 5], "dtype": "float32"}
    shown = text(tmp_path / "a.npz", capsys)
    assert "mdattn convert" in shown
    assert "3×4×5" in shown


@pytest.mark.parametrize(("name", "said"), [("nothing", "No such file"), (".", "is a folder")])
def test_no_file(tmp_path: Path, capsys: Capture, name: str, said: str) -> None:
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert said in complaint(capsys)


@pytest.mark.parametrize("columns", [30, 45, 80, 200])
def test_narrow_terminals(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Nothing is cut off, and lines break at words."""
    path = tmp_path / "d.h5"
    tensors = random_tensors(dtype=FLOAT16)
    write_dataset(path, {"first": tensors, "second": tensors}, How(storage={"chunks": True}))
    monkeypatch.setattr(inspect, "_columns", lambda: columns)
    shown = text(path, capsys)
    lines = shown.splitlines()
    assert all(len(line) <= columns for line in lines if str(tmp_path) not in line)
    words = " ".join(shown.split())
    for word in ("first", "second", f"{SHAPE}, float16, token-major", "chunked"):
        assert word in words


def test_names_cannot_drive_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "d.h5"
    write_dataset(path, {"a": random_tensors(), "b\x1b[2J": random_tensors()})
    shown = text(path, capsys, code=1)
    assert "\x1b" not in shown
    assert r"b\x1b[2J" in shown


def test_what_it_does_not_know(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "d.h5"
    write_dataset(path, {"a": random_tensors(), "b": random_tensors()}, None, {"b": {"slopes": 9}})
    assert "bad: b: has attribute slopes" in text(path, capsys, code=1)
    assert len(facts(path, capsys, "--ignore", "sinks,slopes")["items"]) == 2


def test_heads_that_may_be_tokens(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "d.h5"
    write_dataset(path, {"a": random_tensors((8, 8, 600, 600, 4, 4))})
    assert "8 tokens, 600 heads of 4, bfloat16, token-major" in text(path, capsys)
    (warning,) = facts(path, capsys)["warnings"]
    assert "'a' has more heads than tokens" in warning
    assert "--layout head_major" in warning
    shown = facts(path, capsys, "--layout", "head_major")
    assert shown["items"][0]["shape"] == "600 tokens, 8 heads of 4, bfloat16, head-major"
    write_dataset(path, {"a": random_tensors((8, 8, 128, 128, 4, 4))})
    assert not facts(path, capsys)["warnings"]


def test_token_ids(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "tokens.h5"
    with DatasetWriter(path) as writer:
        writer.add_tokens("one", np.arange(9, dtype=np.uint16))
        writer.add_tokens("packed", np.arange(70), segments=[0, 30])
    found = facts(path, capsys, "--check")
    assert [(item["tokens"], item["documents"]) for item in found["items"]] == [(9, 1), (70, 2)]
    assert "70 tokens of 2 documents" in text(path, capsys)
    with h5py.File(path, "r+") as file:
        file["items/packed/input_ids"][5] = 6
        file["items/worse/query"] = np.zeros((3, 1, 8), np.float16)
    shown = text(path, capsys, "--check", code=1)
    assert "damaged: packed: input_ids has other bytes" in shown
    assert "bad: worse: has no dataset 'input_ids'" in shown
