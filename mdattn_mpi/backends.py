"""Where strategies, devices and TensorRT meet: one backend under each name that a user types.

A backend takes the shards of an item from the host and gives the shard of the output back, in three
steps that a batch interleaves, so that neighbouring items overlap::

    begin(i+1)    upload, and the transfers that need nothing computed
    enqueue(i)    the attention itself
    collect(i)    start the way back; `Download.wait` gives the arrays

These steps are an `Executor`'s; a model's engine has them too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np

from mdattn_mpi.devices.protocol import AnyDevice as AnyDevice
from mdattn_mpi.devices.protocol import Download as Download
from mdattn_mpi.devices.protocol import HostArray as HostArray
from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep import Group, gather_together, together
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName


class Executor(Protocol):
    """What one group of ranks computes with. All but `describe` and `timings` is collective."""

    name: str

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """An array with undefined contents that `begin` takes without waiting for it."""
        ...

    def begin(self, plan: Any, *shards: HostArray) -> Any:
        """Take the rank's shards of an item; start what needs nothing computed."""
        ...

    def enqueue(self, execution: Any) -> None:
        """Compute a begun item; may return before it is done."""
        ...

    def collect(self, execution: Any) -> Download:
        """Start bringing the outputs of an enqueued item to the host."""
        ...

    def describe(self) -> Mapping[str, str]:
        """The device and the libraries, with versions."""
        ...

    def timings(self) -> Mapping[str, float]:
        """Seconds spent so far in ``compute``, ``exchange`` and ``merge``."""
        ...

    def close(self) -> None:
        """Release everything, in order."""
        ...

    def abort(self) -> None:
        """Release what would keep other ranks waiting; wait for none of them."""
        ...


class Backend(Executor, Protocol):
    """An executor of attention: `begin` takes the shards of query, key and value, and the sinks."""

    def prepare(self, problems: Iterable[AttentionProblem], strategy: str) -> None:
        """Make ready, once, what `problems` will need; what can't be done `plan` refuses."""
        ...

    def plan(
        self, problem: AttentionProblem, strategy: StrategyName | Literal["auto"], *, lse: bool
    ) -> Plan:
        """Choose a strategy, or refuse what this backend can't do.

        Raises
        ------
        RejectedError
            With the reason and the backend or strategy that can.

        """
        ...


@dataclass
class Execution:
    """An item between `begin` and `collect`."""

    steps: Generator[None, None, tuple[Any, Any]]
    result: tuple[Any, Any] | None = None


class StrategyBackend:
    """Our own strategies over a device."""

    def __init__(self, name: str, device: AnyDevice) -> None:
        self.name = name
        self.device = device

    def prepare(self, problems: Iterable[AttentionProblem], strategy: str) -> None:
        """Tell the device which calls will come; it needn't be asked twice about any problem."""
        from mdattn_mpi.strategies import STRATEGIES
        from mdattn_mpi.strategies.rehearsal import rehearse

        for problem in dict.fromkeys(problems):
            with suppress(RejectedError):
                plan = self.plan(problem, cast(Any, strategy), lse=False)
                calls = rehearse(STRATEGIES[plan.strategy], plan, self.device.rank)
                self.device.prepare(problem, calls)

    def plan(
        self, problem: AttentionProblem, strategy: StrategyName | Literal["auto"], *, lse: bool
    ) -> Plan:
        """Choose among our own strategies."""
        from mdattn_mpi.strategies import choose

        kernel = self.device.check(problem)
        ranks, costs = self.device.ranks, self.device.costs(problem)
        name, reasons = choose(problem, ranks, strategy, costs)
        reasons = (*reasons, *kernel)
        size = costs.node_size
        return Plan(problem, name, ranks, self.name, lse, node_size=size, reasons=reasons)

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """Ask the device."""
        return self.device.host_empty(shape, dtype)

    def begin(self, plan: Plan, *shards: HostArray) -> Execution:
        """Upload the shards and run the strategy up to its ``yield``."""
        from mdattn_mpi.strategies import STRATEGIES

        arrays = map(self.device.upload, shards)
        steps = self.device.perform(STRATEGIES[plan.strategy], plan, *arrays, ahead=True)
        next(steps)
        return Execution(steps)

    def enqueue(self, execution: Execution) -> None:
        """Run the strategy to its end."""
        execution.result = run_to_end(execution.steps)

    def collect(self, execution: Execution) -> Download:
        """Start the download of output and LSE."""
        assert execution.result is not None
        download = self.device.download(*execution.result)
        execution.result = None
        return download

    def attend(self, plan: Plan, *arrays: Any) -> tuple[Any, Any]:
        """Collective. Attend to shards that are on the device; return output and LSE there."""
        from mdattn_mpi.strategies import attend_alone

        return attend_alone(self.device, plan, *arrays)

    def describe(self) -> Mapping[str, str]:
        """Ask the device."""
        return self.device.describe()

    def timings(self) -> Mapping[str, float]:
        """Ask the device."""
        return dict(self.device.seconds)

    def close(self) -> None:
        """Release the device."""
        self.device.close()

    def abort(self) -> None:
        """Abort the device."""
        self.device.abort()


def backend_name(name: str, group: Group) -> str:
    """Collective. What `name` stands for: ``auto`` is cuda where all ranks have it, else cpu."""
    from mdattn_mpi.devices.presence import why_no_cuda

    if name != "auto":
        return name
    return "cpu" if any(gather_together(group, "backend", why_no_cuda)) else "cuda"


# Imports may fail on some ranks: apart from the opening, which is collective.


def _import_cuda() -> Callable[..., Any]:
    from mdattn_mpi.devices.cuda.open import open_cuda

    return open_cuda


def _import_tensorrt() -> Callable[[Group, str], Backend]:
    from mdattn_mpi.trt.backend import TensorRTBackend
    from mdattn_mpi.trt.runtime import open_runtime
    from mdattn_mpi.trt.store import Cache

    return lambda group, engine: TensorRTBackend(open_runtime(group), Cache.default(), engine)


def open_backend(
    name: str,
    group: Group,
    *,
    threads: int = 0,
    transfer: str = "auto",
    kernel: str = "auto",
    engine: str = "",
) -> Backend:
    """Collective. Open the backend that the user named for this group of ranks.

    Parameters
    ----------
    name
        ``cpu``, ``cuda``, ``tensorrt``, or ``auto``: ``cuda`` where every rank has a GPU of its
        own and the libraries, else ``cpu``.
    threads
        Threads a rank on the CPU; 0 takes the rank's share of its node's cores.
    transfer
        How GPUs exchange shards; see `devices.cuda`.
    kernel
        What attends on GPUs: auto, cudnn or flash; see `devices.cuda`.
    engine
        A serialized TensorRT engine to use instead of building one.

    Raises
    ------
    RejectedError, DeviceError
        The backend isn't there, or not on every rank.

    """
    name = backend_name(name, group)
    if name == "cpu":
        from mdattn_mpi.devices.cpu.device import open_cpu

        return StrategyBackend("cpu", open_cpu(group, threads))
    if name == "cuda":
        open_cuda = together(group, "backend", _import_cuda)
        return StrategyBackend("cuda", open_cuda(group, transfer=transfer, kernel=kernel))
    if name == "tensorrt":
        open_tensorrt = together(group, "backend", _import_tensorrt)
        return open_tensorrt(group, engine)
    raise RejectedError(f"backend {name!r}", fix="use cpu, cuda, tensorrt or auto")
