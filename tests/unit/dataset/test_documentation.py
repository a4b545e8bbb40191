"""The code in docs/file-format.md does what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import open_dataset, open_output, open_tokens
from mdattn_mpi.problem import AttentionProblem
from tests.support.finished import finished

PAGE = Path(__file__).parents[3] / "docs" / "file-format.md"
READER, WRITER, TOKENS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(code: str, folder: Path) -> str:
    """Run it as a program of its own, where it can't import the package by chance."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not result.returncode, result.stderr
    assert code == TOKENS or "mdattn" not in re.sub(r'"mdattn-dataset"', "", code)
    return result.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reader_in_ten_lines(tmp_path: Path, dtype: str) -> None:
    problem = AttentionProblem(40, 30, 2, 1, 16, 16, dtype)  # type: ignore[arg-type]
    files = finished(tmp_path, {"a": problem, "b": problem})
    with open_output(files.output, writable=True) as output:
        output.ledger.fail(output.item("b"), "no")
        spreads = [float(output.read(i, "output").astype(float).std()) for i in output.items]
    assert files.output.name == "out.h5"
    assert len(READER.split("with ")[1].splitlines()) <= 10
    printed = run(READER, tmp_path).splitlines()
    assert printed == [f"a done (40, 2, 16) {spreads[0]}", f"b to do (40, 2, 16) {spreads[1]}"]


def test_the_writer(tmp_path: Path) -> None:
    run(WRITER, tmp_path)
    with open_dataset(tmp_path / "data.h5") as dataset:
        assert [item.name for item in dataset.items] == ["first", "second"]
        assert dataset.items[1].problem == AttentionProblem(
            1234, 1234, 8, 2, 64, 64, causal="upper_left"
        )
        assert not dataset.warnings
    assert main(["inspect", str(tmp_path / "data.h5")]) == 0


def test_every_name_in_the_tables_is_there(tmp_path: Path) -> None:
    files = finished(tmp_path, {"a": AttentionProblem(40, 30, 2, 1, 16, 16)}, lse=True)
    text = PAGE.read_text()
    with h5py.File(files.output) as file:
        for name in file["ledger"]:
            assert f"`/ledger/{name}`" in text
        for name in file["items/a"]:
            assert f"`/items/<name>/{name}`" in text
        for name in file["items/a"].attrs:
            assert f"`{name}`" in text
        assert np.array_equal(file["ledger/spans"][0, 0], [[0, 20], [40, 40]])


def test_the_writer_of_token_ids(tmp_path: Path) -> None:
    run(TOKENS, tmp_path)
    with open_tokens(tmp_path / "tokens.h5") as file:
        assert [file.describe(item) for item in file.items] == [
            "5 tokens",
            "7 tokens of 2 documents",
        ]
