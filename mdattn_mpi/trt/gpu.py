"""A rank's GPU as TensorRT needs it: memory, copies both ways, a stream to compute on."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mdattn_mpi.errors import DeviceError
from mdattn_mpi.trt.library import SM

HostArray = npt.NDArray[Any]


class Buffer(NamedTuple):
    """Device memory."""

    address: int
    size: int


class Gpu(Protocol):
    """What the backend needs of a GPU; `CudaGpu` is the real one."""

    name: str
    sm: SM
    stream: int

    def buffer(self, size: int) -> Buffer:
        """Take `size` bytes of device memory; waits for nothing."""
        ...

    def give_back(self, buffer: Buffer) -> None:
        """Let a later `buffer` of the same size have it."""
        ...

    def upload(self, host: HostArray, buffer: Buffer) -> None:
        """Start copying `host` to the beginning of `buffer`; zeros follow it."""
        ...

    def uploads_before_compute(self) -> None:
        """Let `stream` wait for all uploads so far."""
        ...

    def mark(self) -> Any:
        """Note how far `stream` has come."""
        ...

    def download(self, buffer: Buffer, host: HostArray, mark: Any) -> None:
        """Wait for `mark`, then copy; any thread may call."""
        ...

    def seconds(self, first: Any, second: Any) -> float:
        """Give both marks back; the time between them, which has passed."""
        ...

    def close(self) -> None:
        """Wait for the GPU and give everything back."""
        ...


class CudaGpu:
    """A GPU through the CUDA runtime.

    Parameters
    ----------
    number
        Among the GPUs that this process sees.

    Raises
    ------
    DeviceError
        No CUDA bindings, no driver, no such GPU.

    """

    def __init__(self, number: int) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise DeviceError(
                f"no CUDA bindings ({error})", fix="pip install 'mdattn_mpi[tensorrt]'"
            ) from error
        self._cuda = runtime
        self._number = number
        self._call(runtime.cudaSetDevice, number)
        properties = self._call(runtime.cudaGetDeviceProperties, number)
        self.name = (
            properties.name.decode() if isinstance(properties.name, bytes) else properties.name
        )
        self.sm: SM = (properties.major, properties.minor)
        self._in, self._out = self._new_stream(), self._new_stream()
        self._compute = self._new_stream()
        self.stream = int(self._compute)
        self._free: dict[int, list[Buffer]] = defaultdict(list)
        self._all: list[Buffer] = []

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call the CUDA runtime; return what it gives beside the error code.

        Raises
        ------
        DeviceError
            With CUDA's name for what went wrong.

        """
        error, *found = function(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise DeviceError(f"{function.__name__}: {error.name}", fix="see the log; use -b cuda")
        return found[0] if found else None

    def _new_stream(self) -> Any:
        flag = self._cuda.cudaStreamNonBlocking
        return self._call(self._cuda.cudaStreamCreateWithFlags, flag)

    def buffer(self, size: int) -> Buffer:
        """See `Gpu`."""
        if self._free[size]:
            return self._free[size].pop()
        found = Buffer(int(self._call(self._cuda.cudaMalloc, size)), size)
        self._all.append(found)
        return found

    def give_back(self, buffer: Buffer) -> None:
        """See `Gpu`."""
        self._free[buffer.size].append(buffer)

    def upload(self, host: HostArray, buffer: Buffer) -> None:
        """See `Gpu`."""
        cuda, rest = self._cuda, buffer.size - host.nbytes
        contiguous = np.ascontiguousarray(host)
        if host.nbytes:
            self._call(
                cuda.cudaMemcpyAsync,
                buffer.address,
                contiguous.ctypes.data,
                host.nbytes,
                cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
                self._in,
            )  # from pageable memory: returns once `contiguous` may be written again
        if rest:
            self._call(cuda.cudaMemsetAsync, buffer.address + host.nbytes, 0, rest, self._in)

    def uploads_before_compute(self) -> None:
        """See `Gpu`."""
        mark = self._record(self._in)
        self._call(self._cuda.cudaStreamWaitEvent, self._compute, mark, 0)
        self._call(self._cuda.cudaEventDestroy, mark)

    def mark(self) -> Any:
        """See `Gpu`."""
        return self._record(self._compute)

    def _record(self, stream: Any) -> Any:
        event = self._call(self._cuda.cudaEventCreate)
        self._call(self._cuda.cudaEventRecord, event, stream)
        return event

    def download(self, buffer: Buffer, host: HostArray, mark: Any) -> None:
        """See `Gpu`."""
        cuda = self._cuda
        self._call(cuda.cudaSetDevice, self._number)
        self._call(cuda.cudaStreamWaitEvent, self._out, mark, 0)
        if host.nbytes:
            self._call(
                cuda.cudaMemcpyAsync,
                host.ctypes.data,
                buffer.address,
                host.nbytes,
                cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost,
                self._out,
            )
        self._call(cuda.cudaStreamSynchronize, self._out)

    def seconds(self, first: Any, second: Any) -> float:
        """See `Gpu`."""
        elapsed = float(self._call(self._cuda.cudaEventElapsedTime, first, second)) / 1e3
        for mark in (first, second):
            self._call(self._cuda.cudaEventDestroy, mark)
        return elapsed

    def close(self) -> None:
        """See `Gpu`."""
        cuda = self._cuda
        for stream in (self._in, self._compute, self._out):
            self._call(cuda.cudaStreamSynchronize, stream)
            self._call(cuda.cudaStreamDestroy, stream)
        for buffer in self._all:
            self._call(cuda.cudaFree, buffer.address)
        self._all.clear()
        self._free.clear()
