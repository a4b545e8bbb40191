"""A sharded attention block computes what the whole one does: parsed by TensorRT, executed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.network_interpreter import ThreadRanks, interpret, padded
from tests.support.onnx_block import HEAD_DIM, HEADS, evaluate, make_block
from tests.support.tensorrt import library, needs_tensorrt

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytestmark = needs_tensorrt

BATCH = 1


FORMS = {
    "operator": {},
    "joined heads": {"joined": True},
    "grouped": {"kv_heads": 2},
    "grouped and joined": {"kv_heads": 2, "joined": True},
    "causal": {"causal": True},
    "causal, grouped and joined": {"causal": True, "kv_heads": 2, "joined": True},
    "steps": {"steps": True},
    "steps, grouped": {"steps": True, "kv_heads": 2},
}


CASES = [(form, 4) for form in FORMS] + [("operator", 1), ("operator", 2)]


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize(("form", "ranks"), CASES)
def test_block(tmp_path: Path, form: str, strategy: Any, ranks: int) -> None:
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.onnx.model import load_model
    from mdattn_mpi.onnx.shard import shard_model
    from mdattn_mpi.trt.library import Log
    from mdattn_mpi.trt.onnx_import import attentions, parse_model

    options = {"kv_heads": HEADS, **FORMS[form]}
    causal = bool(options.get("causal"))
    model = make_block(**options)
    if strategy == "ring" and causal and ranks > 1:
        with pytest.raises(RejectedError, match=r"node 'attention' .* is causal"):
            shard_model(model, strategy, ranks, {})
        return
    sharded, done = shard_model(model, strategy, ranks, {})
    assert len(done) == (2 if options.get("steps") else 1)
    path = tmp_path / "sharded.onnx"
    path.write_bytes(sharded.SerializeToString())

    found = library()
    log = Log(found)
    network, sharding = parse_model(found, found.api.Builder(log.sink), log, load_model(path), path)
    assert sharding.axes == {"hidden": 0, "output": 0}
    expected_ranks = ranks if strategy == "ring" else 1
    assert [a.num_ranks for a in attentions(found.api, network)] == [expected_ranks]

    tokens = 6 * ranks if strategy == "ring" else 6 * ranks - 3  # ring takes equal shards only
    length = -(-tokens // ranks)
    random = np.random.default_rng(ranks)
    hidden = random.standard_normal((tokens, BATCH, HEADS * HEAD_DIM)).astype(np.float16)
    collectives = {
        node.name: next(a.s.decode().upper() for a in node.attribute if a.name.startswith("coll"))
        for node in sharded.graph.node
        if node.op_type == "DistCollective"
    }

    def one(group: ThreadRanks) -> Any:
        start, stop = (min(r * length, tokens) for r in (group.rank, group.rank + 1))
        inputs = {
            "hidden": padded(hidden[start:stop], length),
            "keys": np.array([tokens], np.int64),
            "causal_keys": np.array([(group.rank + 1) * length], np.int64),
        }
        (output,) = interpret(found.api, network, inputs, group, collectives).values()
        assert output.shape == (length, BATCH, HEADS * HEAD_DIM)
        return output[: stop - start]

    output = np.concatenate(ThreadRanks.run(ranks, one)).astype(float)
    expected = evaluate(model, hidden, options["kv_heads"], causal)
    assert np.abs(expected).max() > 0.5
    assert np.abs(output - expected).max() < 0.01
