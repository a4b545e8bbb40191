"""The engine of a model as an executor: each rank brings its tokens of every input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.onnx.shard import CAUSAL_KEYS, KEYS
from mdattn_mpi.partition import equal_shards
from mdattn_mpi.problem import ModelPlan, ModelProblem, Span, StrategyName, TensorSpec
from mdattn_mpi.trt.gpu import Buffer, HostArray
from mdattn_mpi.trt.runtime import EngineDownload, EngineExecutor, Runtime
from mdattn_mpi.trt.spec import shard_length

NUMBERS = (KEYS, CAUSAL_KEYS)  # inputs that aren't bound: how many keys count


@dataclass
class Running:
    """An item between `begin` and `collect`."""

    plan: ModelPlan
    buffers: dict[str, Buffer]  # of inputs, and from `enqueue` on of outputs
    numbers: dict[str, npt.NDArray[np.int64]]  # the engine reads them until it is done
    marks: tuple[Any, Any] | None = None


class Model(EngineExecutor):
    """Collective. A model's engine, loaded on the ranks of one group.

    Parameters
    ----------
    runtime
        Where it is loaded.
    path
        The engine's file.

    Attributes
    ----------
    manifest
        How it is sharded, and what for.
    inputs, outputs
        The tensors that are bound, -1 in place of the tokens; `keys` and its like are not.

    Raises
    ------
    RejectedError, DeviceError
        It is an engine of plain attention, doesn't fit, or can't be loaded.

    """

    def __init__(self, runtime: Runtime, path: Path) -> None:
        super().__init__(runtime)
        built = runtime.share_file(path)
        self.manifest = built.manifest
        if self.manifest.spec:
            raise RejectedError(
                "this is an engine of plain attention, not of a model",
                file=str(path),
                fix="leave --bind out",
            )
        self._engine = runtime.load(built)
        names = self._engine.inputs
        self._numbers = tuple(name for name in names if name in NUMBERS)
        self.inputs = self._tensors(name for name in names if name not in NUMBERS)
        self.outputs = self._tensors(self._engine.outputs)

    def _tensors(self, names: Iterable[str]) -> tuple[TensorSpec, ...]:
        return tuple(self._tensor(name) for name in names)

    def _tensor(self, name: str) -> TensorSpec:
        axis = self.manifest.axes.get(name)
        if axis is None:
            raise RejectedError(
                f"{name!r} has no dim that counts tokens; only such tensors can be bound",
                fix="make it a constant of the model",
            )
        shape = [max(1, dim) for dim in self._engine.declared_shape(name)]  # -1 was built as 1
        shape[axis] = -1
        if any(dim != 1 for dim in shape[:axis]):
            raise RejectedError(
                f"{name!r} is {shape}: its tokens aren't one run of bytes",
                fix="export the model with tokens first, or with a batch of 1",
            )
        return TensorSpec(name, tuple(shape), self._engine.dtype(name).name, axis)

    def plan(self, problem: ModelProblem) -> ModelPlan:
        """Refuse what the engine can't do.

        Raises
        ------
        RejectedError
            ``ring`` takes equal shards only.

        """
        manifest = self.manifest
        if manifest.strategy == "ring" and problem.tokens % manifest.ranks:
            raise RejectedError(
                f"{problem.tokens} tokens on {manifest.ranks} ranks: TensorRT's multi-device "
                "attention takes equal shards",
                fix="shard the model with -s allgather or -s ulysses",
            )
        why = f"engine {manifest.sha256[:12]}, {manifest.strategy} on {manifest.ranks} ranks"
        strategy = cast(StrategyName, manifest.strategy)
        return ModelPlan(problem, strategy, manifest.ranks, manifest.sha256, (why,))

    def begin(self, plan: ModelPlan, *shards: HostArray) -> Running:
        """Start the upload of the rank's shards, filled up to what the engine takes."""
        length = shard_length(plan.problem.tokens, plan.ranks)
        buffers = {}
        for tensor, shard in zip(self.inputs, shards, strict=True):
            buffers[tensor.name] = self._buffer(tensor, length, shard.dtype)
            self._gpu.upload(shard, buffers[tensor.name])
        values = {KEYS: plan.problem.tokens, CAUSAL_KEYS: (self._group.rank + 1) * length}
        numbers = {name: np.array([values[name]], np.int64) for name in self._numbers}
        return Running(plan, buffers, numbers)

    def _buffer(self, tensor: TensorSpec, length: int, dtype: np.dtype[Any]) -> Buffer:
        return self._gpu.buffer(prod(tensor.with_tokens(length)) * dtype.itemsize)

    def enqueue(self, running: Running) -> None:
        """Collective. Bind the buffers and enqueue."""
        engine, buffers = self._engine, running.buffers
        length = shard_length(running.plan.problem.tokens, running.plan.ranks)
        for tensor in self.inputs:
            address = buffers[tensor.name].address
            engine.set_input(tensor.name, address, tensor.with_tokens(length))
        for name, number in running.numbers.items():
            engine.set_host_input(name, number)
        for tensor in self.outputs:
            shape = engine.output_shape(tensor.name)
            if shape != tensor.with_tokens(length):
                raise DeviceError(
                    f"{tensor.name!r} comes as {list(shape)}, for {length} tokens a rank",
                    fix="the number of tokens must go through the model unchanged",
                )
            buffers[tensor.name] = self._buffer(tensor, length, engine.dtype(tensor.name))
            engine.set_output(tensor.name, buffers[tensor.name].address)
        running.marks = self._enqueue(engine)

    def collect(self, running: Running) -> EngineDownload:
        """Start bringing the rank's own tokens of every output to the host."""
        marks = running.marks
        assert marks is not None
        own = len(self.shards(running.plan)[self._group.rank])
        arrived = [
            self._gpu.download(
                running.buffers[tensor.name],
                tensor.with_tokens(own),
                self._engine.dtype(tensor.name),
                marks[1],
            )
            for tensor in self.outputs
        ]
        return EngineDownload(
            tuple(array for array, _ in arrived),
            tuple(event for _, event in arrived),
            lambda: self._finished(running.buffers.values(), marks),
        )

    @staticmethod
    def shards(plan: ModelPlan) -> tuple[Span, ...]:
        """Tell which tokens each rank brings and gets."""
        return equal_shards(plan.problem.tokens, plan.ranks)

    def describe(self) -> Mapping[str, str]:
        """The GPU, the library, the engine."""
        return {**self._runtime.describe(), "engine": self.manifest.sha256[:12]}
