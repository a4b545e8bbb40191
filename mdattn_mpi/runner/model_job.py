"""A job of a model's engine: read → agree → run → write → agree, an item at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mdattn_mpi.dataset.tensors import (
    ModelOutput,
    TensorFile,
    TensorItem,
    Wanted,
    create_model_output,
    dataset_names,
)
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep import Group, World, together
from mdattn_mpi.runner.job import say
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.trt.bindings import Binding, check_bindings, parse_bindings
from mdattn_mpi.trt.engine_room import EngineRoom, open_room
from mdattn_mpi.trt.model import Model


def run_model_job(
    spec: JobSpec,
    bind: tuple[str, ...],
    world: World,
    open_here: Callable[[Group], EngineRoom] = open_room,
) -> int:
    """Collective. Run a model's engine over every item; return the exit code.

    Parameters
    ----------
    spec
        ``data``, ``output``, ``engine``, ``items``, ``allow`` and ``overwrite`` count.
    bind
        What ``--bind`` was given.
    world
        The ranks; all of them run each item together.
    open_here
        Opens TensorRT on the ranks.

    Raises
    ------
    MdattnError
        The same on all ranks, with the exit code of its class.

    """
    if not spec.engine:
        raise RejectedError("--bind without --engine", fix="name the model's engine: --engine FILE")
    room = open_here(world)
    try:
        job = _open(spec, bind, world, room)
        todo = job.output.todo()
        say(world, f"mdattn: {len(todo)} of {len(job.data.items)} items to do")
        for item in job.data.items:
            if item.name in todo:
                job.do(item)
        room.close()
        job.output.close()
        job.data.close()
        say(world, f"mdattn: done: {spec.output}")
        return 0
    except BaseException:
        room.abort()
        raise


class ModelJob:
    """An open job: engine, files, and what is bound to what."""

    def __init__(
        self,
        world: World,
        model: Model,
        data: TensorFile,
        output: ModelOutput,
        bindings: dict[str, Binding],
    ) -> None:
        self.world = world
        self.model = model
        self.data = data
        self.output = output
        self._datasets = {name: binding.name for name, binding in bindings.items()}

    def do(self, item: TensorItem) -> None:
        """Collective. One item from file to file."""
        world, model = self.world, self.model
        span = model.shards(item.tokens)[world.rank]
        given = together(
            world,
            f"read {item.name}",
            lambda: {
                tensor.name: self.data.read(item, self._datasets[tensor.name], span)
                for tensor in model.inputs
            },
            lambda _: {"item": item.name, "engine": model.manifest.sha256},
        )
        found = together(world, f"run {item.name}", lambda: model.run(item.tokens, given))

        def write() -> None:
            for name, array in found.items():
                self.output.write(item.name, self._datasets[name], span, array)
            self.output.sync(item.name)

        together(world, f"write {item.name}", write)
        together(
            world,
            f"commit {item.name}",
            lambda: self.output.commit(item.name) if world.rank == 0 else None,
        )


def _open(spec: JobSpec, bind: tuple[str, ...], world: World, room: EngineRoom) -> ModelJob:
    """Collective. Check everything before anything is computed."""
    model = together(world, "model", lambda: Model(room, Path(spec.engine)))
    bindings = together(world, "bindings", lambda: _bind(spec, bind, model))
    inputs = {bindings[tensor.name].name: tensor for tensor in model.inputs}
    axes = {dataset: tensor.axis for dataset, tensor in inputs.items()}

    def open_data() -> TensorFile:
        data = TensorFile(spec.data, axes, select=spec.items, allow=spec.allow)
        for item in data.items:
            for dataset, tensor in inputs.items():
                run = item.runs[dataset]
                if run.shape != tensor.with_tokens(item.tokens) or run.dtype != tensor.dtype:
                    raise RejectedError(
                        f"{dataset} is {run.dtype.name} {list(run.shape)}; the engine's "
                        f"{tensor.name!r} takes {tensor.dtype.name} "
                        f"{list(tensor.with_tokens(item.tokens))}",
                        fix="bind the dataset that the model was made for",
                        file=spec.data,
                        item=item.name,
                    )
            try:
                model.shards(item.tokens)
            except RejectedError as error:
                error.item, error.file = item.name, spec.data
                raise
        return data

    data = together(
        world, "dataset", open_data, lambda data: {item.name: item.tokens for item in data.items}
    )
    try:
        output = _open_output(spec, world, model, data, bindings)
    except BaseException:
        data.close()
        raise
    return ModelJob(world, model, data, output, bindings)


def _bind(spec: JobSpec, bind: tuple[str, ...], model: Model) -> dict[str, Binding]:
    bindings = parse_bindings(bind, model.manifest.axes)
    check_bindings(
        bindings,
        [tensor.name for tensor in model.inputs],
        [tensor.name for tensor in model.outputs],
        dataset_names(spec.data, spec.allow),
        file=spec.data,
    )
    return {binding.tensor: binding for binding in bindings}


def _open_output(
    spec: JobSpec, world: World, model: Model, data: TensorFile, bindings: dict[str, Binding]
) -> ModelOutput:
    """Collective. Make the output, or open again what the same job began."""
    names = [item.name for item in data.items]
    outputs = {bindings[tensor.name].name: tensor for tensor in model.outputs}
    attributes: dict[str, str | int] = {
        "engine": model.manifest.sha256,
        "ranks": world.size,
        "bindings": json.dumps({name: binding.path for name, binding in sorted(bindings.items())}),
        "input_bytes": Path(spec.data).stat().st_size,
    }

    def make() -> None:
        if world.rank or (Path(spec.output).exists() and not spec.overwrite):
            return
        wanted = {
            item.name: {
                dataset: Wanted(tensor.with_tokens(item.tokens), tensor.axis, tensor.dtype_name)
                for dataset, tensor in outputs.items()
            }
            for item in data.items
        }
        create_model_output(spec.output, wanted, attributes, overwrite=spec.overwrite)

    together(world, "output", make)
    axes = {dataset: tensor.axis for dataset, tensor in outputs.items()}
    return together(world, "open output", lambda: ModelOutput(spec.output, names, axes, attributes))
