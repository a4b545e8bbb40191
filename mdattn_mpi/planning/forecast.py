"""What a job will take, before it runs: time to the end, memory, and what bounds it.

Items are dealt to ranks as the job itself deals them; how long each takes is the cost model's, with
what is known of the hardware. Then come what stands before the first item and after the last one,
and the disk, which all ranks share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

from mdattn_mpi.estimate import Costs
from mdattn_mpi.planning.gpus import speed_at
from mdattn_mpi.planning.kernel_times import KernelTimes
from mdattn_mpi.planning.schedule import (
    Measure,
    Schedule,
    Time,
    expected_seconds,
    finish_times,
    make_schedule,
)
from mdattn_mpi.problem import AnyProblem, AttentionProblem

# Seconds from the launcher to the first item: Python and MPI, 1.5 on two cores of an EPYC; with a
# GPU's libraries and context 1.6 to 3.8 on two H200s (docs/performance.md), with FlashAttention's,
# PyTorch among them, 2 to 4 more; with a model's, and its proof, 3.5 more on cores and 20 in all on
# those GPUs.
STARTING = {"cores": 1.5, "GPUs": 3.0, "flash": 3.0, "model on cores": 3.5, "model on GPUs": 14.0}

# Bytes of a rank beside its arrays: a GPU's context; and Python, NumPy, MPI, libraries of a GPU.
CONTEXT = 1 << 30
PROCESS_GPU, PROCESS_CPU = 2 << 30, 160 << 20
STAGED = 3  # items whose input, and whose output, a GPU's rank holds in the host's memory

Bound = Literal["files", "GPUs", "cores"]


@dataclass(frozen=True)
class Work:
    """The items of a job.

    Attributes
    ----------
    measure
        What an item takes of a group.
    attention
        One attention of an item.
    files
        Bytes that an item reads, and that it writes.
    weights
        Bytes that every rank loads before the first item.
    left
        Positions of the items that are still to be done; None: all are.

    """

    problems: Sequence[AnyProblem]
    measure: Measure
    attention: Callable[[Any], AttentionProblem]
    files: Callable[[Any], tuple[int, int]]
    weights: int = 0
    left: Sequence[int] | None = None


@dataclass(frozen=True)
class Hardware:
    """What ranks run on.

    Attributes
    ----------
    near, far
        Costs of a group within a node, and of one that several nodes share.
    typical
        Costs that the job itself reckons with when it deals its items.
    gains
        The kernel's speed over that in `near` and `far`, by head dim.
    times
        Measured times of the kernel, which count more than all that.
    starting
        Seconds before anything is loaded or read.
    disk
        Bytes/s that a node's ranks write together.

    """

    near: Costs
    far: Costs
    typical: Costs
    starting: float
    gains: Mapping[int, float] = field(default_factory=dict)
    times: KernelTimes | None = None
    disk: float = inf

    def costs(self, attention: AttentionProblem, ranks: int, per_node: int) -> Costs:
        """Say what a rank costs in a group of so many, of an item with this attention."""
        costs = self.near if ranks <= per_node else self.far
        if self.times:
            return replace(costs, flops=self.times.flops(attention, ranks))
        if not costs.multiprocessors:
            return costs
        dim = attention.head_dim
        gain = self.gains[min(self.gains, key=lambda one: abs(one - dim))] if self.gains else 1.0
        return replace(costs, flops=costs.flops * speed_at(dim) * gain)


@dataclass(frozen=True)
class Forecast:
    """What a job is expected to take on ``nodes`` of ``per_node`` ranks.

    Attributes
    ----------
    seconds
        From the launcher to the end, `starting` included.
    bound
        What it waits for most of the time.
    memory
        Bytes of a GPU that its rank takes at most; 0 without GPUs.
    host_memory
        Bytes of a node.

    """

    nodes: int
    per_node: int
    seconds: float
    starting: float
    bound: Bound
    memory: int
    host_memory: int
    schedule: Schedule

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.per_node


def forecast(
    work: Work, nodes: int, per_node: int, group_size: str, hardware: Hardware
) -> Forecast:
    """Deal the items to ranks as the job does, and see when the last one is done.

    Raises
    ------
    RejectedError
        An item doesn't fit, or the ranks can't be cut into groups of `group_size`.

    """
    names = [f"node {node}" for node in range(nodes) for _ in range(per_node)]
    schedule = make_schedule(work.problems, names, group_size, hardware.typical, work.measure)

    left = range(len(work.problems)) if work.left is None else work.left
    schedule = schedule.only(left)

    def end(**changes: float) -> float:
        seconds = _seconds(work, hardware, per_node, len(names), changes)
        return max(finish_times(schedule, seconds))

    items, computing, files = end(), end(reading=inf, writing=inf), end(flops=inf)
    on_gpus = bool(hardware.near.multiprocessors)
    if on_gpus and left:
        items += _ends(work, schedule, hardware.near)
    written = sum(work.files(work.problems[item])[1] for item in left)
    disk = written / (nodes * hardware.disk)
    starting = hardware.starting + work.weights / hardware.near.reading
    held, staged = _memory(work, schedule, hardware, per_node)
    device: Bound = "GPUs" if on_gpus else "cores"
    return Forecast(
        nodes,
        per_node,
        seconds=starting + max(items, disk),
        starting=starting,
        bound="files" if max(files, disk) > computing else device,
        memory=held + CONTEXT if on_gpus else 0,
        host_memory=per_node * (PROCESS_GPU + staged if on_gpus else PROCESS_CPU + held),
        schedule=schedule,
    )


def _seconds(
    work: Work, hardware: Hardware, per_node: int, world: int, changes: Mapping[str, float]
) -> Time:
    """Seconds of items by number and ranks, if costs were changed in this way."""

    def seconds(problem: AnyProblem, ranks: int, _: Costs) -> float:
        costs = hardware.costs(work.attention(problem), ranks, per_node)
        return work.measure.seconds(problem, ranks, replace(costs, **changes))  # type: ignore[arg-type]

    measure = Measure(seconds, work.measure.memory)
    return expected_seconds(work.problems, world, hardware.near, measure)


def _ends(work: Work, schedule: Schedule, costs: Costs) -> float:
    """Seconds in which no item computes: the first is read, the last is written."""
    dealt = [(work.problems[item], queue.size) for queue in schedule.queues for item in queue.items]
    first, last = dealt[0], dealt[-1]
    reading = work.files(first[0])[0] / first[1] / costs.reading
    return reading + work.files(last[0])[1] / last[1] / costs.writing


def _memory(work: Work, schedule: Schedule, hardware: Hardware, per_node: int) -> tuple[int, int]:
    """Bytes of a rank's arrays at most, and of what waits in the host's memory for a GPU."""
    held = staged = 0
    for problem, size in dict.fromkeys(zip(work.problems, schedule.sizes, strict=True)):
        costs = hardware.costs(work.attention(problem), size, per_node)
        held = max(held, work.measure.memory(problem, size, costs))
        staged = max(staged, STAGED * sum(work.files(problem)) // size)
    return held, staged
