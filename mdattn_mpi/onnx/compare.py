"""A sharded model against the whole one, on the shards of P ranks in one process.

The whole model runs in ONNX Runtime, and so do the ranks (see `ranks`). At the output of every
attention the same with every exchange forgotten is the negative control: it must be seen to be
wrong, or nothing is proved.

A model that is cast is held against the same cast on one rank, so that what 16 bits make of its
values doesn't hide an error of sharding; how much that is, the whole model tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.graph import Links
from mdattn_mpi.onnx.model import (
    ATTENTION,
    INNER_HEADS,
    copied,
    graph_inputs,
    import_onnx,
    labels_of,
    operator,
)
from mdattn_mpi.onnx.ranks import random_inputs, run_ranks
from mdattn_mpi.onnx.segments import Arrays, load_weights, open_session
from mdattn_mpi.onnx.shard import prepare
from mdattn_mpi.onnx.sharding import Sharding
from mdattn_mpi.problem import DTypeName

TOLERANCE = {"float32": 2e-4, "float16": 2e-3}  # of values up to 1; larger ones in proportion
LONGEST = 4096  # tokens of a check
ROUNDED = 5e-2  # what 16 bits may make of the values of a deep model
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
    rounding: float | None = None  # between the cast model on one rank and the whole one

    @property
    def verdict(self) -> str:
        """The worst of all; without an attention whose control is seen nothing is proved."""
        found = {each.verdict for each in self.tensors}
        if self._too_coarse:
            found.add("wrong")
        if all(each.control is None for each in self.tensors):
            found.add("inconclusive")
        return next((each for each in ("wrong", "inconclusive") if each in found), "right")

    @property
    def _too_coarse(self) -> bool:
        return self.rounding is not None and self.rounding > ROUNDED

    def __str__(self) -> str:
        """One line for the model, one for each tensor that isn't right, one for a bad cast."""
        error = max(each.error for each in self.tensors)
        controls = [each.control for each in self.tensors if each.control is not None]
        rounding = "" if self.rounding is None else f"; casting makes {self.rounding:.1e}"
        lines = [
            f"checked with ONNX Runtime on {self.tokens} tokens: {self.verdict} (error {error:.1e};"
            f" with exchanges forgotten at least {min(controls, default=0):.1e}{rounding})"
        ]
        lines += [str(each) for each in self.tensors if each.verdict != "right"]
        if self._too_coarse:
            lines.append(
                f"the cast alone moves values by more than {ROUNDED:.0%} of the largest: leave them"
                " in float32 (--dtype fp32), or accept it (--no-check)"
            )
        return "\n  ".join(lines)


def compare(
    model: Any,
    path: Path,
    sharded: Any,
    sharding: Sharding,
    tokens: int | None = None,
    dtype: DTypeName | None = None,
    named_axes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Comparison:
    """Run both on the same random inputs of `tokens` tokens (default: as many as show windows).

    `dtype` and `named_axes` are what the sharded one was made with. The models stay as they are.

    Raises
    ------
    RejectedError
        ONNX Runtime is missing, or can't run one of the two.

    """
    whole, sharded = (load_weights(copied(each), path) for each in (model, sharded))
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
    names = _stored(dict.fromkeys([*shown, *outputs]), sharded, dtype)
    expected, rounding = _run_whole(whole, inputs, list(names)), None
    wanted = list(names.values())
    if dtype:
        alone = prepare(load_weights(copied(model), path), named_axes or {}, dtype).model
        ((found,), _) = run_ranks(alone, replace(sharding, ranks=1), inputs, tokens, wanted)
        cast = {name: found[own] for name, own in names.items()}
        rounding = max(_relative(name, expected[name], [cast[name]], tokens) for name in names)
        expected = cast
    right, control = run_ranks(sharded, sharding, inputs, tokens, wanted)
    tensors = []
    for name, array in expected.items():
        error, forgotten = (
            _relative(name, array, [each[names[name]] for each in found], tokens)
            for found in (right, control)
        )
        kind = dtype or str(array.dtype)
        seen = forgotten if name in shown else None
        tensors.append(Tensor(name, error, seen, TOLERANCE.get(kind, 0.0), kind != "float32"))
    return Comparison(tokens, tuple(tensors), rounding)


def _shown(name: str, whole: Any) -> str:
    """Return the tensor of the whole model that an attention of the sharded one makes."""
    made = {each for node in whole.graph.node for each in node.output}
    for suffix in ("", "_mdattn_inner", "_float16", "_bfloat16", INNER_HEADS):
        name = name.removesuffix(suffix)
        if name in made:
            return name
    return ""


def _stored(names: Iterable[str], sharded: Any, dtype: str | None) -> dict[str, str]:
    """Return what tensors are called in a model that is cast.

    What only products and attentions read is there in 16 bits alone.
    """
    made = {each for node in sharded.graph.node for each in node.output}
    return {name: name if name in made else f"{name}_{dtype}" for name in names}


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


def _relative(name: str, whole: Any, shards: Sequence[Any], tokens: int) -> float:
    """Return the largest difference in units of the largest value, at least 1."""
    return _error(name, whole, shards, tokens) / max(1.0, float(np.abs(whole).max(initial=0)))


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
