"""Run ``mdattn convert`` and look at what came out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import open_dataset
from mdattn_mpi.problem import AttentionProblem, Span
from tests.support.complaint import complaint
from tests.support.dataset_files import (
    FLOAT16,
    random_tensors,
    same_bits,
)

Tensors = dict[str, Any]


def convert(source: Path, *options: str) -> Path:
    """Run the command."""
    path = source.with_name("converted.h5")
    assert main(["convert", str(source), str(path), "--overwrite", *options]) == 0
    return path


def check(path: Path, items: dict[str, Tensors]) -> None:
    """A dataset holds just these items, contiguous and token-major."""
    with open_dataset(path) as dataset:
        assert [item.name for item in dataset.items] == list(items)
        assert not dataset.warnings
        for item in dataset.items:
            for name, array in items[item.name].items():
                read = dataset.read(item, name, (Span(0, len(array)),))
                assert same_bits(read, np.ascontiguousarray(array))
                data = dataset.tensor(item, name)
                assert dataset.checksum(item, name) == data.crc32


def normal(dtype: Any, **options: Any) -> Tensors:
    """Numbers that survive arithmetic.

    They are float32's: of others `ml_dtypes` makes bfloat16 by rounding twice, as we don't.
    """
    shapes = random_tensors(dtype=FLOAT16, **options)
    draw = np.random.default_rng()
    return {n: draw.standard_normal(a.shape, np.float32).astype(dtype) for n, a in shapes.items()}


def transposed(tensors: Tensors) -> Tensors:
    return {name: np.ascontiguousarray(array.swapaxes(-3, -2)) for name, array in tensors.items()}


def refused(source: Path, capsys: pytest.CaptureFixture[str], said: str, *options: str) -> None:
    """The command says why, and leaves nothing."""
    target = source.with_name("refused.h5")
    assert main(["convert", str(source), str(target), *options]) == 2
    error = complaint(capsys)
    assert said in error
    assert str(source) in error or "pattern" in error
    assert "Fix:" in error
    assert not [name for name in os.listdir(source.parent) if "refused" in name]


def saved(folder: Path, **tensors: Any) -> Path:
    np.savez(folder / "a.npz", **tensors)
    return folder / "a.npz"


def problem_of(path: Path) -> AttentionProblem:
    with open_dataset(path) as dataset:
        (item,) = dataset.items
        return item.problem
