"""Positions counted from ids that aren't padding, as the RoBERTa family has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError

pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.onnx.compare import compare
from mdattn_mpi.onnx.ranks import random_inputs, run_ranks
from mdattn_mpi.onnx.segments import open_session
from mdattn_mpi.onnx.shard import shard_model
from mdattn_mpi.onnx.sharding import read_sharding
from tests.support.onnx_roberta import PADDING, roberta

TOKENS = 23
RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ulysses"), (3, "allgather")])
@pytest.mark.parametrize("axis", [1, -1])
def test_counted_positions(ranks: int, strategy: Any, axis: int) -> None:
    model = roberta(axis=axis)
    sharded, done = shard_model(model, strategy, ranks, {})
    assert read_sharding(sharded, Path()).paddings == {"ids": PADDING}
    assert any(f"'ids' that aren't {PADDING}, which it must not hold" in line for line in done)
    found = compare(model, Path(), sharded, read_sharding(sharded, Path()))
    assert found.verdict == "right", found


def outputs(ids: Any) -> tuple[Any, Any]:
    """Run whole, and on 3 ranks."""
    model = roberta()
    sharded, _ = shard_model(model, "allgather", 3, {})
    sharding = read_sharding(sharded, Path())
    parts, _ = run_ranks(sharded, sharding, {"ids": ids}, ids.shape[1])
    whole = open_session(model).run(None, {"ids": ids})[0]
    return np.concatenate([part["o"] for part in parts], 1)[:, : ids.shape[1]], whole


def test_padding_comes_last_only() -> None:
    """What comes last has the row of padding, as in the whole model; elsewhere it would be seen."""
    ids = RANDOM.choice([0, 1, 2, 4, 5, 6], (1, TOKENS))
    ids[:, -5:] = PADDING
    found, whole = outputs(ids)
    assert np.abs(found - whole).max() < 1e-5
    ids[:, 4] = PADDING
    found, whole = outputs(ids)
    assert np.abs(found - whole).max() > 0.1


def test_padding_is_not_drawn() -> None:
    model = roberta()
    sharded, _ = shard_model(model, "allgather", 3, {})
    ids = random_inputs(model, read_sharding(sharded, Path()), 500, 0)["ids"]
    assert set(ids.reshape(-1)) == {0, 1, 2, 4, 5, 6}


@pytest.mark.parametrize(
    "other",
    [{"told": "Identity"}, {"exclusive": 1}, {"reverse": 1}],
    ids=["equal", "before", "back"],
)
def test_another_count_works_along_the_tokens(other: Any) -> None:
    with pytest.raises(RejectedError, match=r"'bad' \(CumSum\) works along the tokens"):
        shard_model(roberta(**other), "allgather", 2, {})
