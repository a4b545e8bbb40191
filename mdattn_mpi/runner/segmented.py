"""An ONNX model as an executor: segments in ONNX Runtime, attention by a backend of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np

from mdattn_mpi.backends import HostArray, StrategyBackend
from mdattn_mpi.dataset.kinds import must_be_regular
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.files import sha256_of_files
from mdattn_mpi.lockstep import Group
from mdattn_mpi.onnx.attention import ROWS, AttentionNode, attention_nodes, lay_out
from mdattn_mpi.onnx.axes import at_lengths
from mdattn_mpi.onnx.cast import has_float32_attention
from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.model import external_files, graph_inputs, import_onnx, load_model
from mdattn_mpi.onnx.segments import OnHost, Place, Segments, import_onnxruntime, load_weights
from mdattn_mpi.onnx.shard import outer_places, prepare
from mdattn_mpi.onnx.sharding import POSITIONS
from mdattn_mpi.partition import equal_shards
from mdattn_mpi.problem import (
    AttentionProblem,
    DTypeName,
    ModelPlan,
    ModelProblem,
    Partition,
    Plan,
    StrategyName,
    TensorSpec,
)
from mdattn_mpi.text import counted

PROBE = 41  # tokens at which shapes are looked up


class Arrays(NamedTuple):
    """Outputs, on the host already."""

    arrays: tuple[HostArray, ...]

    def wait(self) -> tuple[HostArray, ...]:
        """Return the arrays."""
        return self.arrays


@dataclass
class Running:
    """An item between `begin` and `collect`."""

    plan: ModelPlan
    feeds: dict[str, HostArray]
    outputs: tuple[HostArray, ...] = ()


class SegmentedModel:
    """A model that one group of ranks runs together, each on its own tokens.

    Parameters
    ----------
    backend
        Ours on this group, open; it is closed with the model.
    group
        The ranks.
    path
        The model as an exporter wrote it; see `onnx.shard.prepare` for what is taken.
    strategy
        How attentions are shared.
    threads
        Of ONNX Runtime on the CPU.
    dtype
        On a GPU, of products, attentions and their weights that are in float32.

    Attributes
    ----------
    axes, digest
        The dim of each input and output that counts tokens; what all ranks' files must have.
    paddings
        The id that an input must not hold, by its name.
    inputs, outputs
        The tensors that are bound, -1 in place of the tokens.

    Raises
    ------
    RejectedError
        The model can't be cut into token shards, or ONNX Runtime can't run it.

    """

    def __init__(
        self,
        backend: StrategyBackend,
        group: Group,
        path: Path,
        strategy: str,
        threads: int,
        dtype: DTypeName,
    ) -> None:
        self.name = backend.name
        self._backend, self._group, self._strategy = backend, group, strategy
        self._place = _place_of(backend)
        loaded = load_model(path)
        files = [path, *external_files(loaded, path)]
        for file in files:
            must_be_regular(str(file))
        self.digest = sha256_of_files(files)
        prepared = prepare(loaded, {})
        if backend.name != "cpu" and has_float32_attention(prepared.model):
            prepared = prepare(load_weights(load_model(path), path), {}, dtype)
        places = outer_places(prepared.model, prepared.tokens)
        self.axes = {name: place.dim for name, place in places.items()}
        self.paddings = prepared.paddings
        model = load_weights(prepared.model, path)
        sequences = {place.sequence for each in prepared.places.values() for place in each}
        lengths = dict.fromkeys(sequences, PROBE)
        dims = at_lengths(model, prepared.places, lengths)
        shapes = Lengths(model, dims)
        own = [value for value in graph_inputs(model) if not value.name.startswith(POSITIONS)]
        self.inputs = self._tensors(own, shapes)
        self.outputs = self._tensors(model.graph.output, shapes)
        self._positions = [
            value.name for value in graph_inputs(model) if value.name.startswith(POSITIONS)
        ]
        nodes, types = attention_nodes(prepared, shapes), dict(shapes.types)
        lay_out(model, nodes, types)
        self._nodes = {f"{name}{ROWS}": node for name, node in nodes.items()}
        self._segments = Segments(model, types, threads=threads, place=self._place)
        self._plans: dict[AttentionProblem, Plan] = {}
        self._seconds = 0.0

    def _tensors(self, values: Iterable[Any], shapes: Lengths) -> tuple[TensorSpec, ...]:
        return tuple(self._tensor(value.name, shapes) for value in values)

    def _tensor(self, name: str, shapes: Lengths) -> TensorSpec:
        axis = self.axes.get(name)
        if axis is None:
            raise RejectedError(
                f"{name!r} has no dim that counts tokens; only such tensors can be bound",
                fix="make it a constant of the model",
            )
        shape = list(shapes.shapes[name])
        shape[axis] = -1
        if any(dim != 1 for dim in shape[:axis]):
            raise RejectedError(
                f"{name!r} is {shape}: its tokens aren't one run of bytes",
                fix="export the model with tokens first, or with a batch of 1",
            )
        kind = import_onnx().helper.tensor_dtype_to_np_dtype(shapes.types[name])
        return TensorSpec(name, tuple(shape), str(np.dtype(kind)), axis)

    def plan(self, problem: ModelProblem) -> ModelPlan:
        """Choose how attentions share a sequence; refuse what the backend can't do."""
        plans = [self._plan(node.over(problem.tokens)) for node in self._nodes.values()]
        heaviest = max(plans, key=lambda plan: plan.problem.flops)
        ranks = self._group.size
        why = (f"model {self.digest[:12]}, {counted(len(plans), 'attention')}", *heaviest.reasons)
        return ModelPlan(problem, heaviest.strategy, ranks, self.digest, why)

    def _plan(self, problem: AttentionProblem) -> Plan:
        if problem not in self._plans:
            strategy = cast(StrategyName, self._strategy)
            plan = self._backend.plan(problem, strategy, lse=False)
            owners = tuple((span,) for span in equal_shards(problem.q_tokens, plan.ranks))
            self._plans[problem] = replace(plan, partition=Partition(owners, owners))
        return self._plans[problem]

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """An array for `begin`."""
        return self._backend.host_empty(shape, dtype)

    def begin(self, plan: ModelPlan, *shards: HostArray) -> Running:
        """Take the rank's shards; a rank without tokens runs the segments on one of no meaning."""
        span = equal_shards(plan.problem.tokens, plan.ranks)[self._group.rank]
        own = np.arange(span.start, max(span.stop, span.start + 1), dtype=np.int64)
        feeds = {}
        for tensor, shard in zip(self.inputs, shards, strict=True):
            whole = np.zeros(tensor.with_tokens(len(own)), np.dtype(shard.dtype))
            given = shard.reshape(tensor.with_tokens(len(span)))
            feeds[tensor.name] = given if len(span) else whole
        feeds.update((name, np.minimum(own, plan.problem.tokens - 1)) for name in self._positions)
        return Running(plan, {name: self._place.put(array) for name, array in feeds.items()})

    def enqueue(self, running: Running) -> None:
        """Collective. Run the model, segment after segment."""
        began, run, answer = perf_counter(), self._segments.run(running.feeds), None
        running.feeds = {}
        try:
            while True:
                call = run.send(answer)
                node = self._nodes[call.node.output[0]]
                answer = self._attend(node, running.plan.problem.tokens, call.inputs)
        except StopIteration as end:
            found = end.value
        own = len(equal_shards(running.plan.problem.tokens, running.plan.ranks)[self._group.rank])
        arrays = self._place.take([found[tensor.name] for tensor in self.outputs])
        running.outputs = tuple(
            np.ascontiguousarray(_first(array, own, cast(int, tensor.token_dim)))
            for tensor, array in zip(self.outputs, arrays, strict=True)
        )
        for tensor, array in zip(self.outputs, running.outputs, strict=True):
            if array.shape != tensor.with_tokens(own):
                raise DeviceError(
                    f"{tensor.name!r} comes as {list(array.shape)}, not as "
                    f"{list(tensor.with_tokens(own))}",
                    fix="the number of tokens must go through the model unchanged",
                )
        self._seconds += perf_counter() - began

    def _attend(self, node: AttentionNode, tokens: int, inputs: list[Any]) -> Any:
        """Collective. Attend with the rank's own tokens to those of all ranks."""
        plan, device = self._plan(node.over(tokens)), self._backend.device
        own = len(equal_shards(tokens, plan.ranks)[self._group.rank])
        shards = [device.adopt(each)[:own] for each in inputs]
        output, _ = self._backend.attend(plan, *shards)
        if not own:  # the segments run on a token of no meaning
            output = device.upload(np.zeros((1, *output.shape[1:]), output.dtype))
        return device.export(output)

    def collect(self, running: Running) -> Arrays:
        """Give the outputs, which are there."""
        return Arrays(running.outputs)

    def describe(self) -> Mapping[str, str]:
        """The device and the libraries, with versions."""
        version = import_onnxruntime().__version__
        return {**self._backend.describe(), "onnxruntime": str(version)}

    def timings(self) -> Mapping[str, float]:
        """Seconds of attention and segments in ``compute``."""
        found = dict(self._backend.timings())
        others = found.get("exchange", 0.0) + found.get("merge", 0.0)
        return {**found, "compute": max(0.0, self._seconds - others)}

    def close(self) -> None:
        """Release the device."""
        self._backend.close()

    def abort(self) -> None:
        """Abort the device."""
        self._backend.abort()


def _place_of(backend: StrategyBackend) -> Place:
    """Say where segments run: where the backend attends."""
    if backend.name == "cpu":
        return OnHost()
    from mdattn_mpi.runner.on_gpu import OnGpu

    return OnGpu(backend.device)  # type: ignore[arg-type]


def _first(array: HostArray, count: int, dim: int) -> HostArray:
    return cast(HostArray, np.take(array, range(count), dim))
