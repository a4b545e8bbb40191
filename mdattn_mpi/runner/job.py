"""A job that is under way: what it knows, and how its ranks do something together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mdattn_mpi.backends import Executor
from mdattn_mpi.dataset import AnyItem, Output, TensorFile
from mdattn_mpi.dataset.seen import Seen
from mdattn_mpi.errors import ItemError
from mdattn_mpi.lockstep import World, together
from mdattn_mpi.planning.schedule import Schedule
from mdattn_mpi.problem import AnyPlan
from mdattn_mpi.runner.groups import JobGroup
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.progress import INDENT
from mdattn_mpi.runner.work import Kind
from mdattn_mpi.text import wrapped


@dataclass
class Job:
    """An open job: everything has been checked and agreed on, nothing computed yet."""

    spec: JobSpec
    world: World
    kind: Kind
    dataset: TensorFile
    items: Sequence[AnyItem]
    schedule: Schedule
    groups: list[JobGroup]  # one a queue of the schedule
    sources: Mapping[str, Seen] | None = None  # what goes in beside the dataset; None: not known
    output: Output | None = None
    todo: list[AnyItem] = field(default_factory=list)
    failed: list[ItemError] = field(default_factory=list)
    stopped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # opening, and all items
    phases: dict[str, float] = field(default_factory=dict)  # seconds of this rank in each
    background: dict[str, float] = field(default_factory=dict)

    @property
    def executor(self) -> Executor:
        """One for all, where only the kind of device matters."""
        return self.groups[0].executor

    @property
    def plans(self) -> dict[str, AnyPlan]:
        """Of all items that this rank's groups may do; on rank 0, of all items."""
        return {name: plan for group in self.groups for name, plan in group.plans.items()}


def scan_once(world: World, phase: str, scan: Callable[[], bytes]) -> bytes:
    """Collective. Look at a file on rank 0, and give its catalog to all ranks."""
    catalog = together(world, phase, lambda: scan() if world.rank == 0 else None)
    return world.bcast_bytes(catalog)


def add_seconds(sums: dict[str, float], more: Mapping[str, float]) -> None:
    """Add `more` to `sums`, name by name."""
    for name, seconds in more.items():
        sums[name] = sums.get(name, 0.0) + seconds


def say(spec: JobSpec, world: World, text: str) -> None:
    """Tell the user on rank 0, unless it is to be quiet."""
    if world.rank == 0 and not spec.quiet:
        tell(text)


def tell(text: str) -> None:
    """Print, wrapped for a narrow terminal."""
    print(wrapped(text, INDENT), file=sys.stderr, flush=True)
