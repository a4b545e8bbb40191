"""A device whose calls of one plan are recorded and replayed; see `step`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.memory import DeviceArray
from mdattn_mpi.devices.cuda.step import Steps
from mdattn_mpi.problem import Plan


class ReplayingDevice(CudaDevice):
    """One rank's GPU in a group whose GPUs all reach each other by copy engines.

    Parameters
    ----------
    steps
        What is recorded and replayed.
    args, options
        As for `device.CudaDevice`.

    """

    def __init__(self, steps: Steps, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps = steps

    def perform(
        self,
        attend: Callable[..., Any],
        plan: Plan,
        *inputs: DeviceArray,
        ahead: bool = False,
        **options: Any,
    ) -> Generator[None, None, tuple[DeviceArray, DeviceArray]]:
        """See `protocol.HostedDevice`."""
        return self.steps.perform(self, attend, plan, inputs, ahead, options)

    def is_ready(self, plan: Plan, **options: Any) -> bool:
        """See `protocol.HostedDevice`: where it will be replayed from a frame that is free."""
        return self.steps.is_ready(plan, options)

    def describe(self) -> dict[str, str]:
        """The GPU, the libraries, the way of the messages, and how many calls were replayed."""
        replayed = {"replayed": self.steps.describe()} if self.steps.counts else {}
        return {**super().describe(), **replayed}

    def close(self) -> None:
        """Collective. Release everything, in order."""
        if self._open:
            self._gpu.synchronize()
            self.steps.close()
        super().close()
