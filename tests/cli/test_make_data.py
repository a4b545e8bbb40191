"""``mdattn make-data``: the items that were asked for, the same bytes for the same seed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from mdattn_mpi.cli import main, make_data
from mdattn_mpi.dataset import Item, open_dataset, open_tokens
from mdattn_mpi.problem import AttentionProblem, Span
from tests.support.complaint import complaint


def made(folder: Path, options: str, name: str = "d.h5") -> Path:
    """Run the command with small shapes."""
    path = folder / name
    small = "--length 60 --q-heads 4 --kv-heads 2 --head-dim 16 --overwrite"
    assert main(["make-data", str(path), *small.split(), *options.split()]) == 0
    return path


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("", AttentionProblem(60, 60, 4, 2, 16, 16)),
        ("--dtype fp16 --kv-length 7", AttentionProblem(60, 7, 4, 2, 16, 16, "float16")),
        ("--causal", AttentionProblem(60, 60, 4, 2, 16, 16, causal="upper_left")),
        (
            "--causal-lower-right --v-head-dim 24 --scale 0.3",
            AttentionProblem(60, 60, 4, 2, 16, 24, causal="lower_right", scale=0.3),
        ),
    ],
)
def test_what_was_asked_for(tmp_path: Path, options: str, problem: AttentionProblem) -> None:
    with open_dataset(made(tmp_path, f"--items 3 {options}")) as dataset:
        assert dataset.items == tuple(Item(f"item{n}", n, problem) for n in range(3))
        assert not dataset.warnings


@pytest.mark.parametrize("encoding", ["float", "uint16", "opaque"])
@pytest.mark.parametrize("layout", ["token_major", "head_major"])
def test_encodings_and_layouts(tmp_path: Path, encoding: str, layout: str) -> None:
    path = made(tmp_path, f"--items 1 --encoding {encoding} --layout {layout}")
    with open_dataset(path) as dataset:
        data = dataset.tensor(dataset.items[0], "value")
        assert (data.encoding, data.layout) == (encoding, layout)
        assert dataset.checksum(dataset.items[0], "value") == data.crc32


def test_lengths_from_a_range(tmp_path: Path) -> None:
    with open_dataset(made(tmp_path, "--items 50 --lengths 10:30")) as dataset:
        lengths = [item.problem.q_tokens for item in dataset.items]
        assert all(item.problem.kv_tokens == item.problem.q_tokens for item in dataset.items)
    assert 10 <= min(lengths) < 15
    assert 25 < max(lengths) <= 30
    with open_dataset(made(tmp_path, "--items 5 --lengths 10:30 --kv-length 44")) as dataset:
        assert {item.problem.kv_tokens for item in dataset.items} == {44}


def test_the_seed_decides_and_the_block_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tmp_path, "--seed 5", "a.h5").read_bytes()
    time.sleep(1.1)  # the time isn't noted either
    assert made(tmp_path, "--seed 5", "b.h5").read_bytes() == first
    assert made(tmp_path, "--seed 6", "c.h5").read_bytes() != first
    monkeypatch.setattr(make_data, "BLOCK", 1000)
    assert made(tmp_path, "--seed 5", "d.h5").read_bytes() == first


def test_the_first_items_stay_when_there_are_more(tmp_path: Path) -> None:
    few = made(tmp_path, "--items 2", "a.h5")
    more = made(tmp_path, "--items 5", "b.h5")
    with open_dataset(few) as a, open_dataset(more) as b:
        for item in a.items:
            for name in ("query", "key", "value"):
                crc32s = {d.tensor(item, name).crc32 for d in (a, b)}  # type: ignore[arg-type]
                assert len(crc32s) == 1


def test_numbers_are_normally_distributed_and_all_different(tmp_path: Path) -> None:
    path = made(tmp_path, "--items 2 --length 2000 --dtype fp16")
    with open_dataset(path) as dataset:
        arrays = [
            dataset.read(item, name, (Span(0, 2000),)).astype(np.float64).reshape(-1)  # type: ignore[arg-type]
            for item in dataset.items
            for name in ("query", "key", "value")
        ]
    for array in arrays:
        assert abs(array.mean()) < 0.02
        assert abs(array.std() - 1) < 0.02
        assert abs((array**4).mean() - 3) < 0.15
    for a, b in ((0, 3), (1, 2), (1, 4)):
        assert abs(np.corrcoef(arrays[a], arrays[b])[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--items 0", "--items is 0"),
        ("--seed -1", "--seed -1"),
        ("--length 0", "q_tokens is 0"),
        ("--kv-length 0", "kv_tokens is 0"),
        ("--kv-heads 3", "no multiple of 3 kv heads"),
        ("--head-dim 300", "head_dim is 300"),
        ("--scale -1", "scale is -1"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    assert main(["make-data", str(tmp_path / "d.h5"), *options.split()]) == 2
    error = complaint(capsys)
    assert said in error
    assert "Fix:" in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("lengths", ["9", "9:", "0:5", "7:3", "a:b", "1:2:3"])
def test_ranges_that_are_none(tmp_path: Path, lengths: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["make-data", str(tmp_path / "d.h5"), "--lengths", lengths])
    assert caught.value.code == 2


def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.h5").write_text("mine")
    assert main(["make-data", str(tmp_path / "d.h5"), "--length", "8"]) == 2
    assert "--overwrite" in complaint(capsys)
    assert (tmp_path / "d.h5").read_text() == "mine"


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "1e39", "1e-46"])
def test_scales_that_float32_cannot_hold(
    tmp_path: Path, scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make-data", str(tmp_path / "d.h5"), f"--scale={scale}"]) == 2
    assert f"scale is {float(scale)}" in complaint(capsys)
    assert not list(tmp_path.iterdir())


def test_token_ids_of_long_tailed_lengths(tmp_path: Path) -> None:
    made = []
    for name in "a.h5", "b.h5":
        path = tmp_path / name
        command = ["make-data", str(path), "--items", "60", "--lengths", "10:1000"]
        assert main([*command, "--vocabulary", "50", "--quiet"]) == 0
        made.append(path.read_bytes())
    assert made[0] == made[1]
    with open_tokens(tmp_path / "a.h5") as file:
        lengths = [item.problem.tokens for item in file.items]
        assert len(lengths) == 60
        assert 10 <= min(lengths) < sorted(lengths)[30] < 300 < max(lengths) <= 1000
        assert {number for item in file.items for number in file.ids(item)} == set(range(50))
