"""A sharded model against the whole one, on the shards of P ranks in one process.

The whole model runs in ONNX Runtime. The sharded file runs there too, segment by segment, rank by
rank; attentions and collectives are computed here. At the output of every attention the same with
every exchange forgotten is the negative control: it must be seen to be wrong, or nothing is proved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.graph import Links
from mdattn_mpi.onnx.model import (
    ATTENTION,
    INNER_HEADS,
    RANK_COUNT,
    attribute_of,
    graph_inputs,
    import_onnx,
    labels_of,
    operator,
)
from mdattn_mpi.onnx.segments import Arrays, Call, Segments, load_weights, open_session
from mdattn_mpi.onnx.sharding import CAUSAL_KEYS, KEYS, POSITIONS, Sharding

TOLERANCE = {"float32": 2e-4, "float16": 2e-3}  # of values up to 1; larger ones in proportion
LONGEST = 4096  # tokens of a check
ROUNDED = 5e-2  # what 16 bits may make of the values of a deep model, and no error of sharding
CONTROL = 10  # how many times the error the control must be


@dataclass(frozen=True)
class Tensor:
    """One tensor of both models: errors in units of its largest value, at least 1."""

    name: str
    error: float
    control: float | None  # None: no attention's output
    tolerance: float
    rounded: bool = False  # in 16 bits

    @property
    def verdict(self) -> str:
        """``right``, ``wrong`` or ``inconclusive``.

        Inconclusive is an error that the control doesn't stand out from, and one above the
        tolerance that may as well be rounding.
        """
        seen = self.control is None or self.control > CONTROL * self.error
        if self.error <= self.tolerance:
            return "right" if seen else "inconclusive"
        return "inconclusive" if self.rounded and seen and self.error <= ROUNDED else "wrong"

    def __str__(self) -> str:
        """In words."""
        control = "" if self.control is None else f", control {self.control:.1e}"
        return f"{self.name}: {self.verdict}, error {self.error:.1e}{control}"


@dataclass(frozen=True)
class Comparison:
    """What came out, tensor by tensor."""

    tokens: int
    tensors: tuple[Tensor, ...]

    @property
    def verdict(self) -> str:
        """The worst of all; without an attention whose control is seen nothing is proved."""
        found = {each.verdict for each in self.tensors}
        if all(each.control is None for each in self.tensors):
            found.add("inconclusive")
        return next((each for each in ("wrong", "inconclusive") if each in found), "right")

    def __str__(self) -> str:
        """One line for the model, one for each tensor that isn't right."""
        error = max(each.error for each in self.tensors)
        controls = [each.control for each in self.tensors if each.control is not None]
        lines = [
            f"checked with ONNX Runtime on {self.tokens} tokens: {self.verdict} (error {error:.1e};"
            f" with exchanges forgotten at least {min(controls, default=0):.1e})"
        ]
        return "\n  ".join(lines + [str(each) for each in self.tensors if each.verdict != "right"])


def compare(
    model: Any,
    path: Path,
    sharded: Any,
    sharding: Sharding,
    tokens: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Comparison:
    """Run both on the same random inputs of `tokens` tokens (default: as many as show windows).

    `dtype` is what the sharded one was cast to: then it is rounding that is seen, and sharding only
    as far as it makes larger errors. The models are left as they are.

    Raises
    ------
    RejectedError
        ONNX Runtime is missing, or can't run one of the two.

    """
    whole, sharded = (load_weights(_copied(each), path) for each in (model, sharded))
    tokens = tokens or check_length(whole, sharded, sharding)
    inputs = random_inputs(whole, sharding, tokens, seed)
    outputs = [value.name for value in whole.graph.output]
    shown = [
        name
        for node in sharded.graph.node
        if operator(node) in ATTENTION
        for name in [_shown(node.output[0], whole)]
        if name
    ]
    expected = _run_whole(whole, inputs, list(dict.fromkeys([*shown, *outputs])))
    segments = Segments(sharded, _dims_of(sharded, inputs, sharding, tokens), list(expected))
    feeds = [_shard(inputs, sharding, tokens, rank) for rank in range(sharding.ranks)]
    right = _lockstep(segments, feeds, exchange)
    control = _lockstep(segments, feeds, forget)
    tensors = []
    for name, array in expected.items():
        size = max(1.0, float(np.abs(array).max(initial=0)))
        errors = [
            _error(name, array, [each[name] for each in found], tokens) / size
            for found in (right, control)
        ]
        kind = str(array.dtype)
        tolerance = ROUNDED if dtype else TOLERANCE.get(kind, 0.0)
        seen = errors[1] if name in shown else None
        tensors.append(Tensor(name, errors[0], seen, tolerance, kind != "float32"))
    return Comparison(tokens, tuple(tensors))


def _shown(name: str, whole: Any) -> str:
    """Return the tensor of the whole model that an attention of the sharded one makes."""
    made = {each for node in whole.graph.node for each in node.output}
    for suffix in ("", "_mdattn_inner", "_float16", "_bfloat16", INNER_HEADS):
        name = name.removesuffix(suffix)
        if name in made:
            return name
    return ""


def check_length(whole: Any, sharded: Any, sharding: Sharding) -> int:
    """Choose a length that shows windows, that the ranks don't divide, and that tables allow.

    TensorRT's multi-device attention (``ring``) takes equal shards only.

    Raises
    ------
    RejectedError
        The whole model takes a single length: too long, or one that ``ring`` can't share equally.

    """
    ranks = sharding.ranks
    if fixed := _fixed_length(whole, sharding):
        if sharding.strategy == "ring" and fixed % ranks:
            raise RejectedError(
                f"ring takes equal shards, and {ranks} ranks don't divide {fixed} tokens",
                fix="export the model with dynamic lengths",
            )
        if fixed > LONGEST:
            raise RejectedError(
                f"the model takes {fixed} tokens only, and a check at most {LONGEST}",
                fix="export the model with dynamic lengths",
            )
        return fixed
    constants = {tensor.name: tensor for tensor in sharded.graph.initializer}
    windows = [
        int(import_onnx().numpy_helper.to_array(constants[node.input[1]]))
        for node in sharded.graph.node
        if operator(node) == "LessOrEqual" and "_mdattn_" in node.name
    ]
    links = Links(sharded)
    tables = [
        constants[table].dims[0]
        for value in graph_inputs(sharded)
        if "position" in value.name
        for table in links.tables(value.name)
        if table in constants
    ]
    tokens: int = min([max([37, 2 * max(windows, default=0)]) + 10 * ranks, LONGEST, *tables])
    if sharding.strategy == "ring":
        return tokens - tokens % ranks
    return tokens - (tokens % ranks == 0)


def _fixed_length(whole: Any, sharding: Sharding) -> int | None:
    """Return the only length that a model takes; None where it takes any."""
    dims = [
        labels_of(value)[axis]
        for value in graph_inputs(whole)
        if (axis := sharding.axes.get(value.name)) is not None
    ]
    return next((dim for dim in dims if isinstance(dim, int)), None)


def _copied(model: Any) -> Any:
    copied = import_onnx().ModelProto()
    copied.CopyFrom(model)
    return copied


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


def _run_whole(model: Any, inputs: Mapping[str, Any], wanted: Sequence[str]) -> Arrays:
    present = {value.name for value in model.graph.output}
    for name in wanted:
        if name not in present:
            model.graph.output.add().name = name
    session = open_session(model)
    names = {each.name for each in session.get_inputs()}
    given = {name: array for name, array in inputs.items() if name in names}
    try:
        return dict(zip(wanted, session.run(list(wanted), given), strict=True))
    except Exception as error:
        raise RejectedError(
            f"ONNX Runtime can't run the whole model: {' '.join(str(error).split())}",
            fix="leave the check out: --no-check",
        ) from error


def _length(tokens: int, ranks: int) -> int:
    return -(-tokens // ranks)


def _dims_of(
    model: Any, inputs: Mapping[str, Any], sharding: Sharding, tokens: int
) -> dict[str, Sequence[int]]:
    shard = _shard(inputs, sharding, tokens, 0)
    return {value.name: shard[value.name].shape for value in graph_inputs(model)}


def _shard(inputs: Mapping[str, Any], sharding: Sharding, tokens: int, rank: int) -> Arrays:
    """Cut what a rank brings, filled up with its last token; and what sharding adds."""
    length = _length(tokens, sharding.ranks)
    own = np.minimum(np.arange(rank * length, (rank + 1) * length), tokens - 1)
    found = {
        name: np.take(array, own, sharding.axes[name]) if name in sharding.axes else array
        for name, array in inputs.items()
    }
    kinds = {KEYS: [tokens], CAUSAL_KEYS: [(rank + 1) * length], POSITIONS: own}
    return found | {kind: np.array(values, np.int64) for kind, values in kinds.items()}


Exchange = Callable[[Any, list[Any], int], list[Any]]  # operation, arrays, the dim gathered along


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


def _lockstep(segments: Segments, feeds: Sequence[Arrays], swap: Any) -> list[Arrays]:
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


def _answer(calls: Sequence[Call], swap: Any) -> list[Any]:
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


def _error(name: str, whole: Any, shards: Sequence[Any], tokens: int) -> float:
    """Put shards together along the dim that differs, and take the largest difference."""
    differ = [n for n in range(whole.ndim) if shards[0].shape[n] != whole.shape[n]]
    if not differ:
        return max(float(np.abs(_wide(each) - _wide(whole)).max(initial=0)) for each in shards)
    joined = np.take(np.concatenate(shards, differ[0]), range(whole.shape[differ[0]]), differ[0])
    if joined.shape != whole.shape:
        raise RejectedError(f"{name!r} comes as {joined.shape}, the whole has {whole.shape}")
    return float(np.nan_to_num(np.abs(_wide(joined) - _wide(whole)), nan=np.inf).max(initial=0))


def _wide(array: Any) -> Any:
    return np.asarray(array).astype(np.float64)
