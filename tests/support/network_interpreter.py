"""Execute a TensorRT network in NumPy, one rank a thread or one rank an MPI process.

It walks the very ``INetworkDefinition`` that goes to the builder, layer by layer, and rounds where
the network rounds. What it proves is what a network *says*: layout, order of heads and of what is
gathered, offsets, masks, scale. What a kernel does with it only a GPU can show.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import ml_dtypes
import numpy as np

Arrays = dict[str, Any]
Collectives = Mapping[str, str]  # the operation of each DistCollective layer, by layer name


class Ranks(Protocol):
    """How the interpreters of a group exchange arrays of equal shape."""

    rank: int
    size: int

    def all_gather(self, array: Any) -> list[Any]: ...


class ThreadRanks:
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def all_gather(self, array: Any) -> list[Any]:
        self._slots[self.rank] = array
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    @staticmethod
    def run(size: int, body: Callable[[ThreadRanks], Any]) -> list[Any]:
        """Call `body` on every rank; a rank that raises frees the others."""
        slots, barrier = [None] * size, threading.Barrier(size, timeout=60)

        def one(rank: int) -> Any:
            try:
                return body(ThreadRanks(rank, slots, barrier))
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(one, rank) for rank in range(size)]
        errors = [future.exception() for future in futures if future.exception()]
        root = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (root or errors)[0]  # type: ignore[misc]
        return [future.result() for future in futures]


class MpiRanks:
    """Ranks that are MPI processes."""

    def __init__(self, comm: Any) -> None:
        self.rank, self.size, self._comm = comm.rank, comm.size, comm

    def all_gather(self, array: Any) -> list[Any]:
        own = np.ascontiguousarray(array)
        found = np.empty((self.size, *own.shape), own.dtype)
        self._comm.Allgather(own.view(np.uint8).reshape(-1), found.view(np.uint8).reshape(-1))
        return list(found)


@contextmanager
def recorded(api: Any) -> Iterator[dict[str, str]]:
    """Note the operation of every DistCollective that is added: the layer itself won't tell.

    The dict is filled in the end, when layers have their names.
    """
    original = api.INetworkDefinition.add_dist_collective
    found: dict[str, str] = {}
    layers: list[tuple[Any, str]] = []

    def add(network: Any, tensor: Any, operation: Any, *rest: Any) -> Any:
        layer = original(network, tensor, operation, *rest)
        layers.append((layer, operation.name))
        return layer

    api.INetworkDefinition.add_dist_collective = add
    try:
        yield found
    finally:
        api.INetworkDefinition.add_dist_collective = original
        found.update({layer.name: operation for layer, operation in layers})


def interpret(
    api: Any,
    network: Any,
    inputs: Mapping[str, Any],
    ranks: Ranks,
    collectives: Collectives,
    layers: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Arrays:
    """Execute `network` on this rank; return its outputs by name.

    Parameters
    ----------
    api
        The TensorRT module.
    network
        A strongly typed ``INetworkDefinition``.
    inputs
        By name, of the dtype and shape that the network declares.
    ranks
        The group. All ranks call this with the same network.
    collectives
        See `recorded`.
    layers
        Kinds of layer that are to be executed in another way than in `LAYERS`.

    """
    layers = {**LAYERS, **layers}
    values: Arrays = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        value = np.asarray(inputs[tensor.name])
        _check(api, tensor, value)
        values[tensor.name] = value
    waiting = [network.get_layer(index) for index in range(network.num_layers)]
    while waiting:  # the parser lists a Range before what makes its inputs
        layer = next(each for each in waiting if _reads(each) <= values.keys())
        waiting.remove(layer)
        kind = layer.type.name
        if kind not in layers:
            raise NotImplementedError(f"layer {layer.name!r} of type {kind}")
        given = [
            None if layer.get_input(i) is None else values[layer.get_input(i).name]
            for i in range(layer.num_inputs)
        ]
        operation = collectives.get(layer.name, "")
        result = layers[kind](_Layer(api, layer, ranks, operation), *given)
        results = result if isinstance(result, tuple) else (result,)
        for number, value in enumerate(results):
            tensor = layer.get_output(number)
            value = np.asarray(value).astype(_dtype(api, tensor.dtype))
            _check(api, tensor, value)
            values[tensor.name] = value
    outputs = (network.get_output(i).name for i in range(network.num_outputs))
    return {name: values[name] for name in outputs}


def _reads(layer: Any) -> set[str]:
    tensors = (layer.get_input(number) for number in range(layer.num_inputs))
    return {tensor.name for tensor in tensors if tensor is not None}


def _check(api: Any, tensor: Any, value: Any) -> None:
    declared = tuple(tensor.shape)
    assert len(declared) == value.ndim, f"{tensor.name}: {declared} against {value.shape}"
    for wanted, found in zip(declared, value.shape, strict=True):
        assert wanted in (-1, found), f"{tensor.name}: {declared} against {value.shape}"
    assert value.dtype == _dtype(api, tensor.dtype), f"{tensor.name}: {value.dtype}"


def _dtype(api: Any, dtype: Any) -> Any:
    if dtype == api.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(api.nptype(dtype))


def typed_layer(api: Any, layer: Any) -> Any:
    """Give a layer the attributes of its own class, which ``get_layer`` hides."""
    classes = {
        "SHUFFLE": api.IShuffleLayer,
        "SLICE": api.ISliceLayer,
        "ELEMENTWISE": api.IElementWiseLayer,
        "CONSTANT": api.IConstantLayer,
        "CONCATENATION": api.IConcatenationLayer,
        "GATHER": api.IGatherLayer,
        "DIST_COLLECTIVE": api.IDistCollectiveLayer,
        "ATTENTION_INPUT": api.IAttentionBoundaryLayer,
        "MATRIX_MULTIPLY": api.IMatrixMultiplyLayer,
        "SOFTMAX": api.ISoftMaxLayer,
        "REDUCE": api.IReduceLayer,
        "UNARY": api.IUnaryLayer,
        "ACTIVATION": api.IActivationLayer,
        "NORMALIZATION": api.INormalizationLayer,
        "FILL": api.IFillLayer,
    }
    if layer.type.name in classes:
        layer.__class__ = classes[layer.type.name]
    return layer


class _Layer:
    """A layer, and what executes it besides its inputs."""

    def __init__(self, api: Any, layer: Any, ranks: Ranks, operation: str) -> None:
        self.api, self.ranks, self.operation = api, ranks, operation
        self.of = typed_layer(api, layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


def constant_values(layer: Any, dtype: Any) -> Any:
    """Return what a constant layer holds, in the dtype of its output."""
    shape = tuple(layer.shape)
    weights = layer.weights
    if not isinstance(weights, np.ndarray):  # bfloat16: NumPy has no such type
        weights = weights.numpy() if hasattr(weights, "numpy") else np.asarray(weights)
    if weights.dtype != dtype and weights.dtype.itemsize == dtype.itemsize:
        weights = weights.view(dtype)
    return weights.reshape(shape)


def _shuffle(layer: _Layer, data: Any, shape: Any = None) -> Any:
    first = list(layer.first_transpose)[: data.ndim]
    data = data.transpose(first)
    if shape is not None:
        wanted = [int(dim) for dim in shape]
    else:
        reshaped = layer.reshape_dims
        wanted = list(data.shape) if reshaped is None else [int(dim) for dim in reshaped]
    if layer.zero_is_placeholder:
        wanted = [data.shape[i] if dim == 0 else dim for i, dim in enumerate(wanted)]
    data = data.reshape(wanted)
    return data.transpose(list(layer.second_transpose)[: data.ndim])


def _slice(layer: _Layer, data: Any, *given: Any) -> Any:
    assert layer.mode.name == "STRICT_BOUNDS", layer.mode
    given = (*given, *[None] * (5 - len(given)))
    start, size, stride = (
        fixed if value is None else [int(dim) for dim in value]
        for value, fixed in zip(given[:3], (layer.start, layer.shape, layer.stride), strict=True)
    )
    axes = layer.axes if given[4] is None else [int(axis) for axis in given[4]]
    axes = range(data.ndim) if axes is None else list(axes)
    for axis, begin, count, step in zip(axes, start, size, stride, strict=True):
        places = begin + step * np.arange(count)  # a stride of 0 repeats
        inside = places.size == 0 or (places.min() >= 0 and places.max() < data.shape[axis])
        assert inside, f"{layer.name}: {list(start)} + {list(size)} of {data.shape}"
        data = np.take(data, places, axis)
    return data


ELEMENTWISE = {
    "SUM": np.add,
    "PROD": np.multiply,
    "SUB": np.subtract,
    "DIV": np.divide,
    "POW": np.power,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "LESS": np.less,
    "EQUAL": np.equal,
}
UNARY = {
    "SQRT": np.sqrt,
    "RECIP": np.reciprocal,
    "EXP": np.exp,
    "NEG": np.negative,
    "ABS": np.abs,
    "SIN": np.sin,
}
REDUCE: dict[str, Any] = {
    "SUM": np.sum,
    "AVG": np.mean,
    "MAX": np.max,
    "MIN": np.min,
    "PROD": np.prod,
}


def _elementwise(layer: _Layer, a: Any, b: Any) -> Any:
    operation = layer.of.op.name
    if operation == "FLOOR_DIV" or (operation == "DIV" and np.issubdtype(a.dtype, np.integer)):
        return a // b
    return ELEMENTWISE[operation](a, b)


def _reduce(layer: _Layer, data: Any) -> Any:
    axes = _axes(layer.axes, data.ndim)
    return REDUCE[layer.of.op.name](data.astype(np.float64), axis=axes, keepdims=layer.keep_dims)


def _axes(mask: int, ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if mask >> axis & 1)


def _softmax(layer: _Layer, data: Any) -> Any:
    (axis,) = _axes(layer.axes, data.ndim)
    return softmax(data.astype(np.float64), axis)


def softmax(scores: Any, axis: int = -1) -> Any:
    weights = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def _matmul(layer: _Layer, a: Any, b: Any) -> Any:
    def operand(data: Any, operation: Any) -> Any:
        data = data.astype(np.float64)
        return data.swapaxes(-1, -2) if operation.name == "TRANSPOSE" else data

    return operand(a, layer.op0) @ operand(b, layer.op1)


def _gather(layer: _Layer, data: Any, indices: Any) -> Any:
    assert layer.num_elementwise_dims == 0
    if layer.mode.name == "ND":
        return data[tuple(np.moveaxis(indices, -1, 0))]
    assert layer.mode.name == "DEFAULT"
    return np.take(data, indices, axis=layer.axis)


def _collective(layer: _Layer, data: Any) -> Any:
    ranks = layer.ranks
    assert layer.num_ranks == ranks.size, f"{layer.num_ranks} ranks, the group has {ranks.size}"
    return exchange(ranks, data, layer.operation)


def exchange(ranks: Ranks, data: Any, operation: str) -> Any:
    """Do what TensorRT's collective of that name does along dim 0."""
    everyone = ranks.all_gather(data)
    if operation == "ALL_GATHER":
        return np.concatenate(everyone)
    if operation == "ALL_TO_ALL":
        assert len(data) % ranks.size == 0, f"{len(data)} rows don't scatter"
        return np.concatenate([np.split(other, ranks.size)[ranks.rank] for other in everyone])
    raise NotImplementedError(f"collective {operation!r}")


def _fill(layer: _Layer, shape: Any = None, start: Any = None, step: Any = None) -> Any:
    assert layer.of.operation.name == "LINSPACE"
    (count,) = layer.shape if shape is None else shape
    return start + np.arange(int(count)) * step


def attention(layer: Any, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    """Attend in float64, ``[B, N, S, H]``; with ``num_ranks`` to the keys of all ranks.

    Of a mask, which is of booleans, those are seen for which it is true.
    """
    of = layer.attention
    assert of.norm_op.name == "SOFTMAX"
    assert of.query_form.name == of.key_value_form.name == "PADDED_BHND"
    kind = of.causal_kind.name
    if of.num_ranks > 1:
        assert of.num_ranks == layer.ranks.size
        assert kind == "NONE", "multi-device attention has no mask"
        key, value = (np.concatenate(layer.ranks.all_gather(x), axis=2) for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    q, k, v = (array.astype(np.float64) for array in (query, key, value))
    k, v = (np.repeat(array, groups, axis=1) for array in (k, v))
    scores = q @ k.swapaxes(-1, -2)
    rows, columns = scores.shape[-2:]
    if kind != "NONE":
        diagonal = columns - rows if kind == "LOWER_RIGHT" else 0
        seen = np.arange(columns) <= np.arange(rows)[:, None] + diagonal
        assert seen.any(axis=1).all(), "a row sees no key: TensorRT divides by zero"
        scores = np.where(seen, scores, -np.inf)
    if mask is not None:
        assert mask.dtype == bool
        scores = np.where(mask, scores, -np.inf)
    return softmax(scores) @ v


def _normalization(layer: _Layer, data: Any, scale: Any, bias: Any = None) -> Any:
    wide = data.astype(np.float64)
    axes = _axes(layer.axes, data.ndim)
    centred = wide - wide.mean(axis=axes, keepdims=True)
    variance = (centred**2).mean(axis=axes, keepdims=True)
    found = centred / np.sqrt(variance + layer.epsilon) * scale
    return found if bias is None else found + bias


def _shape_of(layer: _Layer, data: Any) -> Any:
    return np.array(data.shape, np.int64)


LAYERS: dict[str, Callable[..., Any]] = {
    "CONSTANT": lambda layer: constant_values(layer, _dtype(layer.api, layer.get_output(0).dtype)),
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "ELEMENTWISE": _elementwise,
    "CAST": lambda layer, data: data,
    "IDENTITY": lambda layer, data: data,
    "CONCATENATION": lambda layer, *data: np.concatenate(data, axis=layer.axis),
    "GATHER": _gather,
    "DIST_COLLECTIVE": _collective,
    "ATTENTION_INPUT": attention,
    "ATTENTION_OUTPUT": lambda layer, data: data,
    "MATRIX_MULTIPLY": _matmul,
    "SOFTMAX": _softmax,
    "REDUCE": _reduce,
    "UNARY": lambda layer, data: UNARY[layer.of.op.name](data),
    "NORMALIZATION": _normalization,
    "SHAPE": _shape_of,
    "FILL": _fill,
    "UNSQUEEZE": lambda layer, data, axes: np.expand_dims(data, tuple(int(a) for a in axes)),
    "SQUEEZE": lambda layer, data, axes: np.squeeze(data, tuple(int(a) for a in axes)),
}


def padded(array: Any, rows: int) -> Any:
    """Fill a rank's shard up to `rows` tokens with what must not count."""
    filler = np.full((rows - len(array), *array.shape[1:]), 7.0, array.dtype)
    return np.concatenate([array, filler])


def shards(array: Any, spans: Sequence[Sequence[Any]], rank: int) -> Any:
    """Cut what `rank` owns out of the whole sequence."""
    return np.concatenate([array[span.slice] for span in spans[rank]])
