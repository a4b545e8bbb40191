"""A rank's GPU as an engine needs it: memory, copies both ways, a stream to compute on."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mdattn_mpi.errors import DeviceError
from mdattn_mpi.trt.library import SM

HostArray = npt.NDArray[Any]


class Buffer(NamedTuple):
    """Device memory."""

    address: int
    size: int


class GpuContext:
    """A rank's GPU through the CUDA driver. A mark is a place in the stream that computes."""

    def __init__(self, driver: Any) -> None:
        from mdattn_mpi.devices.cuda.memory import HostBuffers

        self._driver = driver
        self.name: str = driver.name
        self.sm: SM = driver.sm
        self._in, self._compute, self._out = (driver.stream() for _ in range(3))
        self.stream = int(self._compute.handle)
        self._host = HostBuffers(driver)
        self._idle: defaultdict[int, list[Buffer]] = defaultdict(list)
        self._taken: list[Buffer] = []

    def buffer(self, size: int) -> Buffer:
        """Take `size` bytes of device memory."""
        if self._idle[size]:
            return self._idle[size].pop()
        address = self._driver.allocate(size)
        if not address:
            raise DeviceError(
                f"no {size / 2**20:.0f} MiB are left on {self.name}",
                fix="use more ranks, or -b cuda -s ring, which holds 1/P of K and V",
            )
        self._taken.append(Buffer(address, size))
        return self._taken[-1]

    def give_back(self, buffer: Buffer) -> None:
        """Let a later `buffer` of the same size have it."""
        self._idle[buffer.size].append(buffer)

    def upload(self, host: HostArray, buffer: Buffer) -> None:
        """Start copying `host` to the beginning of `buffer`; zeros follow it."""
        zeros = np.zeros(buffer.size - host.nbytes, np.uint8)
        for offset, part in ((0, np.ascontiguousarray(host)), (host.nbytes, zeros)):
            if part.nbytes:  # pageable memory: the call returns once it may be written again
                address = buffer.address + offset
                self._driver.copy(address, part.ctypes.data, part.nbytes, self._in)

    def uploads_before_compute(self) -> None:
        """Let what computes wait for all uploads so far."""
        self._compute.wait(self._driver.record(self._in))

    def mark(self) -> Any:
        """Note how far the computing stream has come."""
        return self._driver.record(self._compute, timed=True)

    def download(
        self, buffer: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any], after: Any
    ) -> tuple[HostArray, Any]:
        """Start copying the beginning of `buffer`, once the mark `after` is reached.

        Returns the array, and an event whose ``sync`` any thread may call.
        """
        host = self._host.empty(shape, dtype)
        self._out.wait(after)
        if host.nbytes:
            self._driver.copy(host.ctypes.data, buffer.address, host.nbytes, self._out)
        return host, self._driver.record(self._out)

    def seconds(self, first: Any, second: Any) -> float:
        """Time between two marks that were reached."""
        return float(second - first) / 1e3

    def close(self) -> None:
        """Wait for the GPU and give everything back."""
        self._driver.synchronize()
        for buffer in self._taken:
            self._driver.release(buffer.address)
        self._taken.clear()
        self._idle.clear()
        self._host.close()
