"""Positions counted from ids that aren't padding, as the RoBERTa family has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.onnx.compare import compare  # noqa: E402
from mdattn_mpi.onnx.ranks import random_inputs, run_ranks  # noqa: E402
from mdattn_mpi.onnx.segments import open_session  # noqa: E402
from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import read_sharding  # noqa: E402
from tests.support.onnx_graph import INT64, graph, node  # noqa: E402

WIDTH, PADDING, TOKENS = 32, 3, 23
RANDOM = np.random.default_rng(5)
INT32 = onnx.TensorProto.INT32


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def roberta(told: str = "Not", axis: int = 1, **attributes: Any) -> Any:
    """Ids, positions counted from them, and one attention."""
    nodes = [
        node("Equal", ["ids", "padding"], ["same"]),
        node(told, ["same"], ["other"]),
        node("Cast", ["other"], ["one"], to=INT32),
        node("CumSum", ["one", "axis"], ["place"], name="bad", **attributes),
        node("Mul", ["place", "one"], ["own"]),
        node("Cast", ["own"], ["wide"], to=INT64),
        node("Add", ["wide", "padding"], ["row"]),
        node("Gather", ["places", "row"], ["where"]),
        node("Gather", ["words", "ids"], ["word"]),
        node("Add", ["word", "where"], ["x"]),
        node("Attention", "xxx", "o", q_num_heads=4, kv_num_heads=4),
    ]
    weights = {
        "padding": np.int64(PADDING),
        "axis": np.int64(axis),
        "places": normal(200, WIDTH),
        "words": normal(7, WIDTH),
    }
    return graph(nodes, {"ids": ([1, "S"], INT64)}, {"o": [1, "S", WIDTH]}, weights)


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ulysses"), (3, "allgather")])
@pytest.mark.parametrize("axis", [1, -1])
def test_counted_positions(ranks: int, strategy: Any, axis: int) -> None:
    model = roberta(axis=axis)
    sharded, done = shard_model(model, strategy, ranks, {})
    assert any(f"'ids' that aren't {PADDING}, which may come last only" in line for line in done)
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
