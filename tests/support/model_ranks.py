"""Transformers on several ranks of one process: a thread and a loopback device each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mdattn_mpi.costs import Costs, cpu_costs
from mdattn_mpi.models.folder import open_folder
from mdattn_mpi.models.load import load
from mdattn_mpi.models.network import Network
from tests.support.fake_group import FakeGroup
from tests.support.loopback import LoopbackDevice, run_ranks

T = TypeVar("T")


class HostedLoopback(LoopbackDevice):
    """With what a backend asks of a device besides the verbs."""

    def costs(self, problem: object) -> Costs:
        return cpu_costs()


_LOADING = threading.Lock()  # Transformers sets the default dtype of the whole process


def network(folder: Path, dtype: Any = "bfloat16", *, head: bool = False) -> Network:
    """Load a model for a rank."""
    with _LOADING:
        return Network(load(open_folder(folder), dtype, "cpu", head=head))


def on_ranks(
    ranks: int,
    folder: Path,
    body: Callable[[Network, LoopbackDevice, Any], T],
    *,
    head: bool = False,
) -> list[T]:
    """Call `body` with a network, a device and a group on every rank; return what each gave."""
    shared: dict[Any, Any] = {}

    def run(device: LoopbackDevice) -> T:
        group = FakeGroup(device.rank, ranks, shared)
        return body(network(folder, head=head), device, group)

    return run_ranks(ranks, run, device=HostedLoopback)
