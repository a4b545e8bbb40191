"""A job before it is started, looked at by one process without MPI: its work, and its hardware."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

from mdattn_mpi.dataset import AnyItem, open_dataset, open_output, open_tokens
from mdattn_mpi.dataset.writer import file_bytes
from mdattn_mpi.devices.cuda.choice import GAIN, takes_flash
from mdattn_mpi.devices.cuda.flash.engine import why_not
from mdattn_mpi.devices.presence import (
    MULTIPROCESSORS,
    gpu_attribute,
    gpu_count,
    gpu_memory,
    gpu_name,
    gpu_sm,
)
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.estimate import PREPARING, input_bytes, typical_costs
from mdattn_mpi.planning.forecast import (
    STARTING,
    Hardware,
    Work,
)
from mdattn_mpi.planning.gpus import GPUS, Gpu, like
from mdattn_mpi.planning.kernel_times import read_kernel_times
from mdattn_mpi.planning.memory import usable_gpu_memory, usable_host_memory
from mdattn_mpi.planning.schedule import ATTENTION, Measure
from mdattn_mpi.problem import DTYPES, AttentionProblem
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.speed import core_flops, disk_bandwidth
from mdattn_mpi.text import counted, quantity

KINDS = 3  # kinds of item that are described one by one


@dataclass
class Prospect:
    """What is to be done, and what should be known of how that was found out.

    Attributes
    ----------
    shapes
        What the items are, in words.
    output
        Bytes of the output.
    width
        Of a model's hidden states.

    """

    work: Work
    shapes: Sequence[str]
    output: int
    width: int = 0
    notes: list[str] = field(default_factory=list)


def look_at(spec: JobSpec) -> Prospect:
    """Look at the dataset, and at the model if there is one, as `mdattn run` will.

    Raises
    ------
    RejectedError
        It can't be done.

    """
    prospect, items = _transformer(spec) if spec.model else _attention(spec)
    if spec.output and Path(spec.output).exists():
        with open_output(spec.output) as output:
            left = output.left(items)
        prospect.work = replace(prospect.work, left=left)
        prospect.notes.append(f"{len(left)} of {counted(len(items), 'item')} left to do")
    return prospect


def _attention(spec: JobSpec) -> tuple[Prospect, Sequence[AnyItem]]:
    def files(problem: AttentionProblem) -> tuple[int, int]:
        return input_bytes(problem), sum(tensor.nbytes for tensor in problem.outputs(spec.lse))

    with open_dataset(
        spec.data,
        select=spec.items,
        layout=spec.layout,
        allow=spec.allow,
        ignore=spec.ignore,
    ) as dataset:
        items = dataset.items
        work = Work([item.problem for item in items], ATTENTION, lambda problem: problem, files)
        shapes = _shapes(dataset.describe(item) for item in items)
        notes = list(dataset.warnings)
        return Prospect(work, shapes, file_bytes(items, spec.lse), notes=notes), items


def _transformer(spec: JobSpec) -> tuple[Prospect, Sequence[AnyItem]]:
    from mdattn_mpi.models.folder import open_folder
    from mdattn_mpi.models.load import skeleton
    from mdattn_mpi.models.network import Network
    from mdattn_mpi.models.outputs import LOGPROBS, check_give
    from mdattn_mpi.models.size import ModelSize

    if spec.model.endswith(".onnx"):
        raise RejectedError("an ONNX model can't be planned", fix="see `mdattn run --dry-run`")
    folder, dtype = open_folder(spec.model), DTYPES[spec.dtype]
    network = Network(skeleton(folder, dtype, head=LOGPROBS in spec.give))
    give = check_give(spec.give, network.causal)
    size = ModelSize(folder, dtype, network.causal, LOGPROBS in give)
    with open_tokens(
        spec.data,
        size.problem_of(network, give, spec.beyond_positions),
        select=spec.items,
        allow=spec.allow,
        ignore=spec.ignore,
    ) as file:
        items = file.items
        work = Work(
            [item.problem for item in items],
            Measure(size.seconds, size.memory),
            lambda problem: size.attention(problem.tokens),
            size.files,
            size.nbytes,
        )
        shapes = _shapes(f"{item.problem.tokens} tokens" for item in items)
        model = f"{network.name}, {quantity(folder.parameters, '')} parameters"
        nbytes = file_bytes(items, lse=False)
        return Prospect(work, [*shapes, model], nbytes, network.width), items


def _shapes(shapes: Iterable[str]) -> list[str]:
    """Of many different ones, none."""
    counts = Counter(shapes)
    if len(counts) > KINDS:
        return []
    return [f"{count} × {shape}" for shape, count in counts.most_common()]


def gpus(
    spec: JobSpec, prospect: Prospect, per_node: int, name: str | None, times: str | None
) -> Hardware:
    """Put together what is known of the GPUs: by `name`, else here, else an H100.

    `times` is a file of kernel times.

    Raises
    ------
    RejectedError
        The kernel that was asked for can't be had, or a file is no good.

    """
    gpu, notes = _gpu(name, prospect.notes), prospect.notes
    flash = takes_flash(spec.kernel, gpu.sm)
    if spec.kernel == "flash" and not flash:
        raise RejectedError(f"--kernel flash: {why_not(gpu.sm)}", fix="leave --kernel out")
    kernel = "flash" if flash else "cudnn"
    notes.append(
        f"kernel: {kernel}, "
        + (f"as it was measured in {times}" if times else "which a job from here would take")
    )
    room = usable_gpu_memory(gpu.memory)
    preparing = 0.0 if flash or spec.model else PREPARING
    near, far = (gpu.costs(near=near, memory=room, preparing=preparing) for near in (True, False))
    far = replace(far, node_size=per_node, near_bandwidth=near.bandwidth)
    return Hardware(
        near,
        far,
        typical_costs("cuda", room, preparing=preparing),
        starting("GPUs", "flash" if flash else "", "model on GPUs" if spec.model else ""),
        gains=GAIN.get(gpu.sm[0], {}) if flash else {},
        times=read_kernel_times(times, kernel) if times else None,
        disk=_disk(spec, per_node, notes),
    )


def _gpu(name: str | None, notes: list[str]) -> Gpu:
    here = gpu_count() > 0
    if here and not name:
        gpu = like(gpu_name(0), gpu_sm(0), gpu_attribute(0, MULTIPROCESSORS), gpu_memory())
    else:
        gpu = GPUS[name or "h100"]
    asked = "asked for" if name else "the one here" if here else "none is here; --gpu names another"
    scaled = "" if gpu.measured else "; never measured: data sheets, scaled from an H200"
    notes.append(f"GPU: {gpu.name} ({asked}{scaled})")
    return gpu


def cores(spec: JobSpec, prospect: Prospect, per_node: int, threads: int) -> Hardware:
    """Try the cores of this machine, which the nodes are taken to be like."""
    work = prospect.work
    largest = max(work.problems, key=lambda problem: problem.work)
    flops = core_flops(work.attention(largest))
    prospect.notes.append(
        f"a core here: {quantity(flops, 'FLOP/s')} of such attention, measured now; nodes are "
        "taken to be like this machine"
    )
    typical = typical_costs("cpu", usable_host_memory(per_node))
    costs = replace(typical, flops=flops * threads)
    if spec.model:
        from mdattn_mpi.models.speed import core_dense_flops

        dense = core_dense_flops(prospect.width, DTYPES[spec.dtype])
        costs = replace(costs, dense=dense * threads)
        prospect.notes.append(f"and {quantity(dense, 'FLOP/s')} of the model's matrix products")
    begin = starting("cores", "model on cores" if spec.model else "")
    return Hardware(costs, costs, typical, begin, disk=_disk(spec, per_node, prospect.notes))


def starting(*parts: str) -> float:
    """Seconds that a rank with these `parts` takes to start."""
    return sum(STARTING[part] for part in parts if part)


def _disk(spec: JobSpec, writers: int, notes: list[str]) -> float:
    """Try the output's folder, if one is named."""
    if not spec.output:
        notes.append("the disk isn't counted: name the output with -o, and its folder is tried")
        return inf
    folder = os.path.dirname(os.path.abspath(spec.output))
    found = disk_bandwidth(folder, writers)
    if found == inf:
        notes.append(f"the disk isn't counted: {folder} couldn't be tried")
    else:
        notes.append(f"disk: {quantity(found, 'B/s')} written from this machine, measured now")
    return found
