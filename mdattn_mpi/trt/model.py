"""The engine of a model as an executor: each rank brings its tokens of every input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.lockstep import together
from mdattn_mpi.onnx.known import KnownRun
from mdattn_mpi.onnx.sharding import CAUSAL_KEYS, KEYS
from mdattn_mpi.partition import equal_shards, shard_length
from mdattn_mpi.problem import ModelPlan, ModelProblem, StrategyName, TensorSpec
from mdattn_mpi.trt.build import BuiltEngine
from mdattn_mpi.trt.gpu import HostArray
from mdattn_mpi.trt.model_proof import ModelVerdict, conclude_model, judge_model
from mdattn_mpi.trt.runtime import EngineExecutor, Execution, Result, Runtime

TRIAL_TOKENS = 16  # a rank, where the engine takes so few
UNPROVEN = (
    "its numbers aren't proven: compare an item with the model in one process, before you rely "
    "on it"
)


class Model(EngineExecutor):
    """Collective. A model's engine, as all ranks of a group have it; loaded, and tried once.

    Where the engine brings a known run (see `onnx.known`), it is held against that. Else what the
    model should give isn't known; that collectives do nothing is: then no rank's output depends on
    the tokens of another, and the engine isn't used.

    Attributes
    ----------
    manifest
        How it is sharded, and what for.
    inputs, outputs
        The tensors that are bound, -1 in place of the tokens; `keys` and its like are not.

    Raises
    ------
    RejectedError, DeviceError
        It is an engine of plain attention, doesn't fit, can't be loaded, or ranks don't depend on
        each other.

    """

    def __init__(self, runtime: Runtime, built: BuiltEngine, file: str) -> None:
        super().__init__(runtime)
        self.manifest = built.manifest
        if self.manifest.spec:
            raise RejectedError(
                "this is an engine of plain attention, not of a model",
                file=file,
                fix="leave --bind out",
            )
        self._engine = runtime.load(built)
        names = self._engine.inputs
        kinds = {name: self.manifest.sharding.given_by_rank(name) for name in names}
        self._given = {name: kind for name, kind in kinds.items() if kind}
        self.inputs = self._tensors(name for name in names if name not in self._given)
        self.outputs = self._tensors(self._engine.outputs)
        self._tried = self._prove(built, file) if built.known else self._try_collectives()

    def _prove(self, built: BuiltEngine, file: str) -> str:
        """Collective. Run it on inputs for which it is known what comes out; see `model_proof`."""
        group, manifest, began = self._group, self.manifest, perf_counter()
        seconds = dict(self._timings)

        def begin() -> Execution:
            shards = (
                np.take(known.inputs[one.name], range(own.start, own.stop), one.token_dim)
                for one in self.inputs
            )
            kinds = (self._engine.dtype(one.name) for one in self.inputs)
            execution = self.begin(
                self._trial_plan(known.tokens),
                *(array.astype(kind) for array, kind in zip(shards, kinds, strict=True)),
            )
            self._blank(execution)
            return execution

        def look() -> ModelVerdict:
            arrays = self.collect(execution).wait()
            names = (tensor.name for tensor in self.outputs)
            found = dict(zip(names, arrays, strict=True))
            return judge_model(known, manifest, group.rank, found)

        known = together(
            group, "known", lambda: KnownRun.from_bytes(bytes(built.known), Path(file))
        )
        own = equal_shards(known.tokens, manifest.ranks)[group.rank]
        execution = together(group, "begin proof", begin)
        together(group, "enqueue proof", lambda: self.enqueue(execution))
        found = group.allgather(asdict(together(group, "judge proof", look)))
        verdicts = [ModelVerdict(**each) for each in found]
        said = together(group, "proof", lambda: conclude_model(manifest, verdicts))
        self._timings = seconds
        return f"{said} on {known.tokens} tokens in {perf_counter() - began:.2f} s"

    def _trial_plan(self, tokens: int) -> ModelPlan:
        manifest = self.manifest
        strategy = cast(StrategyName, manifest.strategy)
        return ModelPlan(ModelProblem(tokens, ()), strategy, manifest.ranks, manifest.sha256)

    def _try_collectives(self) -> str:
        """Collective. Make sure that ranks hear of each other; return what was found, in words."""
        group, manifest, began = self._group, self.manifest, perf_counter()
        unproven = f"{UNPROVEN} ({manifest.unproven})" if manifest.unproven else UNPROVEN
        if group.size == 1 or not any("float" in tensor.dtype for tensor in self.inputs):
            return unproven
        seconds = dict(self._timings)
        first, again = (self._try(seed) for seed in range(2))
        changed = group.allgather(first != again)
        self._timings = seconds
        if not any(changed[1:]):
            error = DeviceError(
                f"{manifest.flavour} {manifest.version} runs {manifest.strategy} without its "
                "collectives: with other tokens on rank 0, all other ranks give the same as before",
                fix="use TensorRT 11.2 or later, or another strategy (mdattn shard -s)",
            )
            error.agreed = True  # all have the same answers
            raise error
        return f"ranks hear of each other (tried in {perf_counter() - began:.2f} s); {unproven}"

    def _try(self, seed: int) -> bytes:
        """Collective. Run it on random numbers, of which only rank 0's depend on `seed`."""
        group = self._group

        def begin() -> Execution:
            ranges = [self._engine.extent(one.name, one.token_dim or 0) for one in self.inputs]
            low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
            length = max(low, min(TRIAL_TOKENS, high))
            random = np.random.default_rng((group.rank, seed if group.rank == 0 else 0))
            plan = self._trial_plan(length * self.manifest.ranks)
            return self.begin(plan, *(_numbers(one, length, random) for one in self.inputs))

        execution = together(group, "begin trial", begin)
        together(group, "enqueue trial", lambda: self.enqueue(execution))
        arrays = together(group, "trial", lambda: self.collect(execution).wait())
        return b"".join(array.tobytes() for array in arrays)

    @property
    def axes(self) -> dict[str, int]:
        """The dim of each input and output that counts tokens."""
        return self.manifest.axes

    @property
    def paddings(self) -> dict[str, int]:
        """The id that an input must not hold, by its name."""
        return self.manifest.paddings

    @property
    def digest(self) -> str:
        """What all ranks' engines must have."""
        return self.manifest.sha256

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
        """Refuse lengths that the engine wasn't built for; ``ring`` takes equal shards only."""
        manifest = self.manifest
        length = shard_length(problem.tokens, manifest.ranks)
        for tensor in self.inputs:
            assert tensor.token_dim is not None
            shortest, longest = self._engine.extent(tensor.name, tensor.token_dim)
            if not shortest <= length <= longest:
                raise RejectedError(
                    f"{problem.tokens} tokens are {length} a rank; the engine takes "
                    f"{shortest} to {longest} a rank in {tensor.name!r}",
                    fix="build it for more lengths (mdattn build --tokens), or leave the item out "
                    "(--items)",
                )
        if manifest.strategy == "ring" and problem.tokens % manifest.ranks:
            raise RejectedError(
                f"{problem.tokens} tokens on {manifest.ranks} ranks: TensorRT's multi-device "
                "attention takes equal shards",
                fix="shard the model with -s allgather or -s ulysses",
            )
        why = f"engine {manifest.sha256[:12]}, {manifest.strategy} on {manifest.ranks} ranks; "
        strategy = cast(StrategyName, manifest.strategy)
        return ModelPlan(problem, strategy, manifest.ranks, manifest.sha256, (why + self._tried,))

    def begin(self, plan: ModelPlan, *shards: HostArray) -> Execution:
        """Start the upload of the rank's shards, filled up to what the engine takes."""
        tokens, rank = plan.problem.tokens, self._group.rank
        length = shard_length(tokens, plan.ranks)
        own = len(equal_shards(tokens, plan.ranks)[rank])
        inputs = {tensor.name: tensor.with_tokens(length) for tensor in self.inputs}
        values = {KEYS: tokens, CAUSAL_KEYS: (rank + 1) * length}
        host_inputs = {n: values[kind] for n, kind in self._given.items() if kind in values}
        positions = [name for name in self._given if name not in host_inputs]
        inputs.update(dict.fromkeys(positions, (length,)))
        # Tokens that fill up the last shards stand anywhere: at the last position.
        own_positions = np.minimum(np.arange(rank * length, (rank + 1) * length), tokens - 1)
        shards = (*shards, *[own_positions] * len(positions))
        results = tuple(
            Result(
                tensor.name,
                tensor.with_tokens(length),
                tensor.with_tokens(own),
                self._engine.dtype(tensor.name),
            )
            for tensor in self.outputs
        )
        return self._begin(self._engine, inputs, shards, host_inputs, results)

    def _check(self, execution: Execution) -> None:
        """Make sure that as many tokens come out as went in."""
        for result in execution.results:
            shape = self._engine.output_shape(result.name)
            if shape != result.shape:
                raise DeviceError(
                    f"{result.name!r} comes as {list(shape)}, not as {list(result.shape)}",
                    fix="the number of tokens must go through the model unchanged",
                )


def _numbers(tensor: TensorSpec, tokens: int, random: np.random.Generator) -> HostArray:
    """Random numbers for an input; ones where it takes whole numbers, which may count anything."""
    shape = tensor.with_tokens(tokens)
    if "float" not in tensor.dtype:
        return np.ones(shape, tensor.dtype)
    return random.standard_normal(shape).astype(tensor.dtype)
