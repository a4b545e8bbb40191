"""Datasets made item by item, as other programs make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mdattn_mpi
from mdattn_mpi.dataset import TENSORS
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Span
from tests.support.reference import random_inputs

PROBLEMS = {
    "one": AttentionProblem(37, 41, 4, 2, 8, 24, "bfloat16", "lower_right", scale=0.25),
    "two": AttentionProblem(23, 23, 2, 2, 8, 8, "float16", "upper_left"),
    "three": AttentionProblem(1, 5, 2, 1, 16, 8, "bfloat16"),
}


@pytest.mark.parametrize("layout", ["token_major", "head_major"])
@pytest.mark.parametrize("encoding", ["float", "uint16"])
def test_what_was_added_is_read_again(tmp_path: Path, layout: Any, encoding: Any) -> None:
    path = tmp_path / "data.h5"
    inputs = {name: random_inputs(problem, 3) for name, problem in PROBLEMS.items()}
    with mdattn_mpi.DatasetWriter(path, layout=layout, encoding=encoding) as data:
        for name, problem in PROBLEMS.items():
            scale = problem.scale if name == "one" else None
            data.add(name, *inputs[name], causal=problem.causal, scale=scale)
        assert not path.exists()
    with mdattn_mpi.open_dataset(path) as dataset:
        assert {item.name: item.problem for item in dataset.items} == PROBLEMS
        for item in dataset.items:
            for tensor, array in zip(TENSORS, inputs[item.name], strict=True):
                everything = (Span(0, len(array)),)
                assert dataset.read(item, tensor, everything).tobytes() == array.tobytes()
                assert dataset.checksum(item, tensor) == dataset.tensor(item, tensor).crc32


def arrays(**shapes: tuple[int, ...]) -> list[Any]:
    every = {"q": (3, 4, 8), "k": (5, 2, 8), "v": (5, 2, 8), **shapes}
    return [np.ones(shape, np.float16) for shape in every.values()]


@pytest.mark.parametrize(
    ("name", "given", "options", "message"),
    [
        ("x", arrays(), {}, r"data.h5, item 'x': is in the dataset already"),
        ("a/b", arrays(), {}, r"item 'a/b': its name looks like a path"),
        ("y", arrays(v=(4, 2, 8)), {}, r"item 'y': q, k, v are .*\[4, 2, 8\]. Fix: .*same tokens"),
        ("y", arrays(q=(3, 4, 7)), {}, r"one head dim"),
        ("y", arrays(q=(3, 4)), {}, r"\[3, 4\]"),
        ("y", [array.astype("f4") for array in arrays()], {}, r"dtype 'float32'. Fix: use bfloat"),
        ("y", [*arrays()[:2], np.ones((5, 2, 8), ml_dtypes.bfloat16)], {}, r"give them one dtype"),
        ("y", arrays(k=(5, 3, 8), v=(5, 3, 8)), {}, r"item 'y': 4 query heads are no multiple"),
        ("y", arrays(), {"causal": "left"}, r"causal is 'left'"),
        ("y", arrays(), {"scale": -1}, r"scale is -1"),
    ],
)
def test_what_can_not_be_an_item_is_refused_and_the_others_stay(
    tmp_path: Path, name: str, given: list[Any], options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "data.h5"
    with mdattn_mpi.DatasetWriter(path) as data:
        data.add("x", *arrays())
        with pytest.raises(RejectedError, match=message):
            data.add(name, *given, **options)
        data.add("z", *arrays())
    with mdattn_mpi.open_dataset(path) as dataset:
        assert [item.name for item in dataset.items] == ["x", "z"]


def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path) -> None:
    def interrupted() -> None:
        with mdattn_mpi.DatasetWriter(tmp_path / "data.h5") as data:
            data.add("x", *arrays())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "data.h5"
    path.write_text("mine")
    with pytest.raises(RejectedError, match="exists already"), mdattn_mpi.DatasetWriter(path):
        pass
    assert path.read_text() == "mine"
    with mdattn_mpi.DatasetWriter(path, overwrite=True) as data:
        data.add("x", *arrays())
    with mdattn_mpi.open_dataset(path) as dataset:
        assert len(dataset.items) == 1
