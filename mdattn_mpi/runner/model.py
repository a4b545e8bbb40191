"""A model's engine as a kind of work: its inputs and outputs are bound to datasets by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from mdattn_mpi.backends import HostArray, StrategyBackend, open_backend
from mdattn_mpi.costs import typical_costs
from mdattn_mpi.dataset import AnyItem, scan_file
from mdattn_mpi.dataset.hdf5 import File
from mdattn_mpi.dataset.named import longest, open_tensors, tensor_names
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.lockstep import Group, World, together
from mdattn_mpi.partition import equal_shards
from mdattn_mpi.planning.schedule import Queue, Schedule, make_schedule
from mdattn_mpi.problem import DTYPES, AnyPlan, ModelPlan, ModelProblem, TensorSpec
from mdattn_mpi.runner.finite import first_nonfinite
from mdattn_mpi.runner.groups import JobGroup, open_groups
from mdattn_mpi.runner.job import Job, scan_once
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.segmented import SegmentedModel
from mdattn_mpi.runner.work import Shard, Task
from mdattn_mpi.trt.bindings import Binding, check_bindings, parse_bindings
from mdattn_mpi.trt.build import BuiltEngine
from mdattn_mpi.trt.model import Model
from mdattn_mpi.trt.onnx_import import make_model
from mdattn_mpi.trt.runtime import Runtime, open_runtime
from mdattn_mpi.trt.store import Cache

AnyModel = Model | SegmentedModel


class ModelWork:
    """A model's engine over every item of a file.

    `inputs` and `outputs` are the engine's tensors in its order, each under the name of its
    dataset, -1 for the tokens; `bindings` is what ``--bind`` said, by the engine's own names.
    `paddings` are ids that an input must not hold, by the name of its dataset.
    """

    def __init__(
        self,
        spec: JobSpec,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        bindings: Mapping[str, Binding],
        engine_digest: str,
        paddings: Mapping[str, int] | None = None,
    ) -> None:
        self.spec = spec
        self.inputs = inputs
        self.outputs = outputs
        self.bindings = bindings
        self.engine_digest = engine_digest
        self.paddings = paddings or {}

    def problem(self, tokens: int) -> ModelProblem:
        """Say what comes out for a sequence of so many tokens."""
        return ModelProblem(tokens, tuple(_sized(tensor, tokens) for tensor in self.outputs))

    def task(self, item: AnyItem, plan: AnyPlan, rank: int) -> Task:
        """Say which tokens of every input the rank reads, and of every output it writes."""
        assert isinstance(plan, ModelPlan)
        tokens, shards = plan.problem.tokens, equal_shards(plan.problem.tokens, plan.ranks)
        own = (shards[rank],)
        reads = tuple(Shard(_sized(tensor, tokens), own) for tensor in self.inputs)
        writes = tuple(
            Shard(tensor, own, here=tensor.token_dim is not None or rank == 0)
            for tensor in plan.problem.outputs
        )
        return Task(item, plan, tuple((span,) for span in shards), reads, writes)

    def check(self, task: Task, shards: Sequence[HostArray]) -> None:
        """Refuse padding, and NaN and infinity, unless they were asked for."""
        self._check(task.item, task.reads, shards, "correct the input")
        for shard, array in zip(task.reads, shards, strict=True):
            padding = self.paddings.get(shard.tensor.name)
            if padding is not None and (array == padding).any():
                (span,) = shard.spans
                raise ItemError(
                    f"{shard.tensor.name} holds {padding}, which is padding to this model, within "
                    f"tokens {span.start} to {span.stop}",
                    fix="leave padding out of the dataset: an item has its own length",
                    file=self.spec.data,
                    item=task.item.name,
                )

    def check_outputs(self, task: Task, arrays: Sequence[HostArray]) -> None:
        """Do the same with what came out."""
        self._check(task.item, task.writes, arrays, "export the model in a wider dtype")

    def _check(
        self, item: AnyItem, shards: Sequence[Shard], arrays: Sequence[HostArray], fix: str
    ) -> None:
        if self.spec.nonfinite == "pass":
            return
        for shard, array in zip(shards, arrays, strict=True):
            at = first_nonfinite(array)
            if at is not None:
                (span,) = shard.spans
                raise ItemError(
                    f"{shard.tensor.name} holds {array.reshape(-1)[at]} within tokens "
                    f"{span.start} to {span.stop}",
                    fix=f"{fix}, or take it as it is with --nonfinite pass",
                    file=self.spec.data,
                    item=item.name,
                )

    def options(self) -> dict[str, str]:
        """Items, engine, and what is bound to what."""
        paths = {name: binding.path for name, binding in sorted(self.bindings.items())}
        return {
            "items": self.spec.items,
            "engine_sha256": self.engine_digest,
            "bindings": json.dumps(paths),
        }


def _sized(tensor: TensorSpec, tokens: int) -> TensorSpec:
    return replace(tensor, shape=tensor.with_tokens(tokens))


def open_model(spec: JobSpec, world: World) -> Job:
    """Collective. Open file and model; plan every item, or refuse before any work.

    The items come after the model: only it knows what is an input and what an output.
    """
    cut = together(world, "schedule", lambda: _one_size(spec, world))
    file = _open_file(spec, world)

    def open_one(group: Group) -> AnyModel:
        if not spec.model:
            runtime = open_runtime(group)
            return Model(runtime, runtime.share_file(Path(spec.engine)), spec.engine)
        if spec.backend == "tensorrt":
            return _build(spec, open_runtime(group), longest(file))
        return _open_segmented(spec, group, world)

    return _open(spec, world, cut, file, open_groups(world, cut, open_one))


def _open_file(spec: JobSpec, world: World) -> File:
    """Collective. Open the dataset; rank 0 has looked at it for all."""
    catalog = scan_once(
        world, "dataset", lambda: scan_file(spec.data, spec.allow, select=spec.items)
    )
    return together(
        world,
        "dataset",
        lambda: File(spec.data, spec.allow, select=spec.items, catalog=catalog),
        lambda file: {"dataset": file.path, "digest": file.fingerprint, "bytes": file.size},
    )


def _build(spec: JobSpec, runtime: Runtime, tokens: int) -> Model:
    """Collective. Build the engine of an ONNX model, or take it from the cache, and load it."""
    library, sm, ranks = runtime.library, runtime.gpu.sm, runtime.group.size
    path, dtype = Path(spec.model), DTYPES[spec.dtype]

    def make() -> BuiltEngine:
        cache = Cache.default()
        return make_model(library, path, ranks, spec.strategy, dtype, tokens, sm, cache)

    return Model(runtime, runtime.share("build engine", make), spec.model)


def _open_segmented(spec: JobSpec, group: Group, world: World) -> SegmentedModel:
    """Collective. Open an ONNX model on the CPUs or the GPUs of a group."""
    name = "cuda" if spec.backend == "cuda" else "cpu"
    backend = open_backend(
        name, group, threads=spec.threads, transfer=spec.transfer, kernel=spec.kernel
    )
    return together(
        group,
        "model",
        lambda: SegmentedModel(
            cast(StrategyBackend, backend),
            group,
            Path(spec.model),
            spec.strategy,
            spec.threads or world.cores,
            DTYPES[spec.dtype],
        ),
        lambda model: {"model": model.digest},
    )


def _check_segmented(spec: JobSpec) -> None:
    """Refuse what an ONNX model can't have."""
    others = {
        "--lse": spec.lse,
        "--engine": spec.engine,
        "--layout": spec.layout != "auto",
        "--group-size auto": spec.group_size == "auto",
    }
    wrong = next((name for name, given in others.items() if given), None)
    if wrong:
        raise RejectedError(f"{wrong} with --model {spec.model}", fix=f"leave {wrong} out")


def check_options(spec: JobSpec) -> None:
    """Refuse what a model's engine, or an ONNX model, has decided already.

    Raises
    ------
    RejectedError
        Says which option to leave out.

    """
    if spec.model:
        _check_segmented(spec)
        return
    if spec.backend not in ("auto", "tensorrt"):
        raise RejectedError(f"-b {spec.backend} with --bind", fix="leave -b out: TensorRT runs it")
    if spec.lse:
        raise RejectedError("--lse with --bind", fix="bind an output of the model instead")
    if spec.strategy != "auto":
        raise RejectedError(
            f"-s {spec.strategy} with --bind",
            fix="leave -s out: the engine has been sharded for one strategy",
        )
    if spec.group_size == "auto":
        raise RejectedError(
            "--group-size auto with --bind",
            fix="name the number of ranks that the engine was built for",
        )


def _one_size(spec: JobSpec, world: World) -> Schedule:
    """Cut the world into groups of the size that was asked for; the items come later."""
    costs = typical_costs("cpu" if spec.model and spec.backend != "tensorrt" else Model.name)
    schedule = make_schedule((), world.nodes, spec.group_size, costs)
    size = world.size if spec.group_size == "all" else int(spec.group_size)
    return replace(schedule, queues=(Queue(size, ()),))


def _open(spec: JobSpec, world: World, cut: Schedule, file: File, groups: list[JobGroup]) -> Job:
    """Collective. Bind the model that the groups have loaded to the file."""
    (group,) = groups
    model = cast(AnyModel, group.executor)
    work = together(
        world,
        "bindings",
        lambda: _bind(spec, model, tensor_names(file)),
        lambda work: {"engine": work.engine_digest},
    )
    dataset = together(world, "items", lambda: open_tensors(file, work.inputs, work.problem))
    items = dataset.items
    size = cut.queues[0].size
    longest_first = sorted(range(len(items)), key=lambda number: -items[number].problem.tokens)
    schedule = replace(cut, queues=(Queue(size, tuple(longest_first)),), sizes=(size,) * len(items))
    group.plan(world, items, model.plan, spec.data)
    return Job(spec, world, work, dataset, items, schedule, groups)


def _bind(spec: JobSpec, model: AnyModel, names: Sequence[str]) -> ModelWork:
    tensors = [tensor.name for tensor in (*model.inputs, *model.outputs)]
    texts = spec.bind or [f"{name}=items/*/{name}" for name in tensors]
    bound = parse_bindings(texts, model.axes)
    check_bindings(
        bound,
        [tensor.name for tensor in model.inputs],
        [tensor.name for tensor in model.outputs],
        names,
        file=spec.data,
    )
    bindings = {binding.tensor: binding for binding in bound}

    written = [bindings[tensor.name].path for tensor in model.outputs]
    if len(set(written)) < len(written):
        raise RejectedError("two outputs are bound to one dataset", fix="bind each to its own")

    def renamed(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(replace(tensor, name=bindings[tensor.name].name) for tensor in tensors)

    paddings = {bindings[name].name: padding for name, padding in model.paddings.items()}
    inputs, outputs = renamed(model.inputs), renamed(model.outputs)
    return ModelWork(spec, inputs, outputs, bindings, model.digest, paddings)
