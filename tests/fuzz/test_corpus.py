"""The seeds of the fuzzer, and what it has found, in the normal tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.reader import CORPUS, read_any

SEEDS = sorted(CORPUS.iterdir())


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_seeds(tmp_path: Path, seed: Path) -> None:
    outcomes = read_any(str(tmp_path / "input"), seed.read_bytes())
    assert all(outcome in ("read", "RejectedError", "ItemError") for outcome in outcomes)


def test_the_seeds_reach_every_reader(tmp_path: Path) -> None:
    outcomes = {p.name: read_any(str(tmp_path / "input"), p.read_bytes()) for p in SEEDS}
    assert outcomes["ours.h5"] == ["read", "RejectedError", "read"]
    assert outcomes["gzip.h5"] == ["read", "RejectedError", "read"]
    assert outcomes["output.h5"] == ["RejectedError", "read", "read"]
    assert outcomes["a.npz"][2] == outcomes["a.safetensors"][2] == "read"
