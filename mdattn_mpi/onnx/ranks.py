"""P ranks of a sharded model in one process: their inputs, and a run of all of them.

Segments run in ONNX Runtime, rank by rank; attentions and collectives are computed here. With every
exchange forgotten a rank gets what its own tokens alone would give: the negative control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np

from mdattn_mpi.onnx.graph import Links
from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.model import (
    RANK_COUNT,
    attribute_of,
    graph_inputs,
    import_onnx,
    labels_of,
    operator,
)
from mdattn_mpi.onnx.segments import Arrays, Call, Segments
from mdattn_mpi.onnx.sharding import CAUSAL_KEYS, KEYS, POSITIONS, Sharding

Exchange = Callable[[str, list[Any], int], list[Any]]  # operation, arrays, dim gathered along


def random_inputs(model: Any, sharding: Sharding, tokens: int, seed: int) -> Arrays:
    """Draw inputs: ids that are in their tables, positions in order, masks of ones, or normal."""
    random = np.random.default_rng(seed)
    links, kinds = Links(model), import_onnx().helper.tensor_dtype_to_np_dtype
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    found = {}
    for value in graph_inputs(model):
        axis = sharding.axes.get(value.name)
        dims = [dim if isinstance(dim, int) else 1 for dim in labels_of(value)]
        if axis is None and "mask" in value.name.lower():
            dims = [dim if isinstance(dim, int) else tokens for dim in labels_of(value)]
            dims[0] = 1
        elif axis is not None:
            dims[axis] = tokens
        kind = kinds(value.type.tensor_type.elem_type)
        tables = [rows.get(table, 2) for table in links.tables(value.name)]
        array: Any
        if kind.kind == "f":
            array = random.standard_normal(dims)
        elif "mask" in value.name.lower() or kind.kind == "b":
            array = np.ones(dims)
        elif "position" in value.name.lower() and axis is not None:
            array = np.broadcast_to(
                np.arange(tokens).reshape([-1 if n == axis else 1 for n in range(len(dims))]), dims
            )
        else:
            array = random.integers(0, min(tables, default=2), dims)
        found[value.name] = np.ascontiguousarray(array.astype(kind))
    return found


def run_ranks(
    sharded: Any,
    sharding: Sharding,
    inputs: Mapping[str, Any],
    tokens: int,
    wanted: Sequence[str] | None = None,
) -> tuple[list[Arrays], list[Arrays]]:
    """Run a sharded model, whose weights are in it, on the shards of all ranks.

    Return `wanted` (default: its outputs) of every rank, and the same with exchanges forgotten.
    """
    names = [value.name for value in graph_inputs(sharded)]
    feeds = [_shard(names, inputs, sharding, tokens, rank) for rank in range(sharding.ranks)]
    dims = {name: array.shape for name, array in feeds[0].items()}
    segments = Segments(sharded, Lengths(sharded, dims).types, wanted)
    return _lockstep(segments, feeds, exchange), _lockstep(segments, feeds, forget)


def _length(tokens: int, ranks: int) -> int:
    return -(-tokens // ranks)


def _shard(
    names: Sequence[str], inputs: Mapping[str, Any], sharding: Sharding, tokens: int, rank: int
) -> Arrays:
    """Cut what a rank brings, filled up with zeros as an engine's is; and what sharding adds."""
    length = _length(tokens, sharding.ranks)
    own = np.minimum(np.arange(rank * length, (rank + 1) * length), tokens - 1)
    given = {KEYS: [tokens], CAUSAL_KEYS: [(rank + 1) * length], POSITIONS: own}
    found: Arrays = {}
    for name in names:
        if kind := sharding.given_by_rank(name):
            found[name] = np.array(given[kind], np.int64)
        elif name in sharding.axes:
            axis = sharding.axes[name]
            shard = np.take(
                inputs[name], range(rank * length, min((rank + 1) * length, tokens)), axis
            )
            fill = [(0, (length - shard.shape[n]) * (n == axis)) for n in range(shard.ndim)]
            found[name] = np.pad(shard, fill)
        else:
            found[name] = inputs[name]
    return found


def exchange(operation: str, arrays: list[Any], dim: int = 0) -> list[Any]:
    """Let ranks exchange: ``all_gather`` along `dim`, or ``all_to_all`` along the first."""
    if operation == "all_gather":
        return [np.concatenate(arrays, dim)] * len(arrays)
    parts = [np.split(array, len(arrays)) for array in arrays]
    return [np.concatenate([part[rank] for part in parts]) for rank in range(len(arrays))]


def forget(operation: str, arrays: list[Any], dim: int = 0) -> list[Any]:
    """Do the same with every rank's own tokens only."""
    if operation == "all_gather":
        return [np.concatenate([array] * len(arrays), dim) for array in arrays]
    return list(arrays)


def _lockstep(segments: Segments, feeds: Sequence[Arrays], swap: Exchange) -> list[Arrays]:
    """Run all ranks to each call, compute it for all, and go on."""
    runs = [segments.run(feed) for feed in feeds]
    answers: list[Any] = [None] * len(runs)
    while True:
        calls, results = [], []
        for run, answer in zip(runs, answers, strict=True):
            try:
                calls.append(run.send(answer))
            except StopIteration as end:
                results.append(end.value)
        if results:
            return results
        answers = _answer(calls, swap)


def _answer(calls: Sequence[Call], swap: Exchange) -> list[Any]:
    node = calls[0].node
    inputs = [call.inputs for call in calls]
    if operator(node) == "DistCollective":
        operation = attribute_of(node, "collective_operation").decode()
        return list(swap(operation, [each[0] for each in inputs], 0))
    if attribute_of(node, RANK_COUNT, 1) > 1:
        for number in (1, 2):
            gathered = swap("all_gather", [each[number] for each in inputs], -2)
            for each, array in zip(inputs, gathered, strict=True):
                each[number] = array
    return [attend(node, *each) for each in inputs]


def attend(node: Any, q: Any, k: Any, v: Any, mask: Any = None, *_rest: Any) -> Any:
    """Compute an attention node in float32, densely."""
    heads = attribute_of(node, "q_num_heads", 0), attribute_of(node, "kv_num_heads", 0)
    joined, kind = q.ndim == 3, q.dtype
    if joined:
        q, k, v = (
            each.reshape(*each.shape[:2], count, -1).swapaxes(1, 2)
            for each, count in ((q, heads[0]), (k, heads[1]), (v, heads[1]))
        )
    q, k, v = (each.astype(np.float32) for each in (q, k, v))
    k, v = (np.repeat(each, q.shape[1] // each.shape[1], 1) for each in (k, v))
    default = 1.0 if operator(node) == "TRT_Attention" else 1 / sqrt(q.shape[-1])
    scores = np.float32(attribute_of(node, "scale", default)) * (q @ k.swapaxes(-1, -2))
    if cap := attribute_of(node, "softcap", 0.0):
        scores = cap * np.tanh(scores / cap)
    rows, columns = scores.shape[-2:]
    causal = attribute_of(node, "causal_kind", b"none")
    if attribute_of(node, "is_causal", 0) or causal != b"none":
        diagonal = columns - rows if causal == b"lower_right" else 0
        scores = np.where(np.tri(rows, columns, diagonal, dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    found = (weights / np.where(total == 0, 1, total)) @ v
    if joined:
        found = found.swapaxes(1, 2).reshape(*found.shape[0:1], rows, -1)
    return np.ascontiguousarray(found.astype(kind))
