"""Datasets made item by item, as other programs make them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

import mdattn_mpi
from mdattn_mpi.dataset import TENSORS, Item, open_dataset
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Span
from tests.support.reference import random_inputs

PROBLEMS = {
    "one": AttentionProblem(37, 41, 4, 2, 8, 24, "bfloat16", "lower_right", scale=0.25),
    "two": AttentionProblem(23, 23, 2, 2, 8, 8, "float16", "upper_left"),
    "three": AttentionProblem(1, 5, 2, 1, 16, 8, "bfloat16"),
}


def test_masks_and_what_goes_with_them(tmp_path: Path) -> None:
    problem = AttentionProblem(
        30, 30, 4, 2, 8, 8, "float16", "upper_left",
        window=(5, 0), softcap=20.0, sinks=True, segments=(0, 4, 17),
    )  # fmt: skip
    q, k, v, sinks = random_inputs(problem, 2)
    said = {name: getattr(problem, name) for name in ("causal", "window", "softcap", "segments")}
    with mdattn_mpi.DatasetWriter(tmp_path / "d.h5") as data:
        data.add("a", q, k, v, sinks=sinks, **said)
        data.add("plain", q, k, v)
        with pytest.raises(RejectedError, match=r"sinks are float64 \[4\]"):
            data.add("b", q, k, v, sinks=sinks.astype(float))
    with open_dataset(tmp_path / "d.h5") as opened:
        item, plain = opened.items
        assert item.problem == problem
        assert plain.problem == replace(
            problem, causal="none", window=(-1, -1), softcap=0.0, sinks=False, segments=()
        )
        assert (opened.read(item, "sinks", ()) == sinks).all()
        for name in ("query", "sinks", "segments"):
            assert opened.tensor(item, name).crc32 == opened.checksum(item, name)
        digest = opened.digest
    with h5py.File(tmp_path / "d.h5", "a") as file:
        file["items/a/segments"][1] = 5
    with open_dataset(tmp_path / "d.h5") as opened:  # another document is another problem
        assert opened.items[0].problem.segments == (0, 5, 17)
        assert opened.digest != digest


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sinks", np.zeros(3, np.float32), "3 sinks"),
        ("sinks", np.zeros(4), "sinks holds float64"),
        ("segments", np.array([0, 40]), "segments: 40 is none of 30 tokens"),
        ("segments", np.array([0, 4, 4]), "4 comes after 4"),
        ("segments", np.array([2, 4]), "segments begin with 2"),
        ("segments", np.array([0, 4], np.int32), "segments holds int32"),
        ("segments", np.zeros(5000, np.int64), "5000 segments"),
        ("window", 3, "attribute window isn't two integers"),
        ("window", np.array([3.0, 0.0]), "window"),
        ("window", np.array([3, -2]), "window is"),
        ("softcap", -1.0, "softcap is -1.0"),
    ],
)
def test_masks_that_make_no_sense_are_refused(
    tmp_path: Path, name: str, value: Any, said: str
) -> None:
    problem = AttentionProblem(30, 30, 4, 2, 8, 8, "float16")
    with mdattn_mpi.DatasetWriter(tmp_path / "d.h5") as data:
        data.add("a", *random_inputs(problem, 2))
    with h5py.File(tmp_path / "d.h5", "a") as file:
        item = file["items/a"]
        if name in ("window", "softcap"):
            item.attrs[name] = value
        else:
            item[name] = value
    with pytest.raises(RejectedError, match=said):
        open_dataset(tmp_path / "d.h5")


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
        (
            "y",
            arrays(v=(4, 2, 8)),
            {},
            r"item 'y': key and value .*\[4, 2, 8\]\). Fix: .*same tok",
        ),
        ("y", arrays(q=(3, 4, 7)), {}, r"head dims disagree: query 7, key 8"),
        ("y", arrays(q=(3, 4)), {}, r"\[3, 4\]"),
        (
            "y",
            [array.astype("f4") for array in arrays()],
            {},
            r"dtype 'float32' .*Fix: use bfloat",
        ),
        (
            "y",
            [*arrays()[:2], np.ones((5, 2, 8), ml_dtypes.bfloat16)],
            {},
            r"all three one dtype",
        ),
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


def test_nothing_is_left_of_items_that_have_one_name(tmp_path: Path) -> None:
    item = Item("x", 0, AttentionProblem(5, 5, 2, 1, 8, 8))
    with (
        pytest.raises(RejectedError, match="is in the dataset already"),
        mdattn_mpi.DatasetWriter(tmp_path / "data.h5", [item, item]),
    ):
        pass
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
