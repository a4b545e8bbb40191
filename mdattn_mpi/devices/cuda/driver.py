"""One GPU as this package uses it: addresses, streams, events and one kernel.

Everything that touches CUDA itself is on this page and in `cudnn` and `devices.nccl`; tests put a
double here. Addresses are integers; a copy may go between any two of them, the host's included.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver as cu
from cuda.core import (
    Device,
    EventOptions,
    Program,
    ProgramOptions,
    StreamOptions,
)
from cuda.core.utils import StridedMemoryView

from mdattn_mpi.devices.cuda.gpu import View
from mdattn_mpi.devices.cuda.memory import contiguous_strides
from mdattn_mpi.devices.cuda.merge import MergeCall
from mdattn_mpi.errors import DeviceError, RejectedError


class Gpu:
    """A GPU of this process, with its primary context made current.

    Parameters
    ----------
    ordinal
        Which of the visible GPUs.

    Raises
    ------
    DeviceError
        CUDA can't use it.

    """

    def __init__(self, ordinal: int) -> None:
        # With fewer channels than streams, a stream that waits holds up another one.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        self._device = Device(ordinal)
        self._device.set_current()
        self.ordinal = ordinal
        self.name: str = self._device.name
        capability = self._device.compute_capability
        self.sm = (int(capability.major), int(capability.minor))
        properties = self._device.properties
        self.multiprocessors = int(properties.multiprocessor_count)
        self.pci_bus_id = str(self._device.pci_bus_id)
        driver = int(check(cu.cuDriverGetVersion()))
        self.driver, self.driver_major = version(driver), driver // 1000
        self.library_major = int(cu.CUDA_VERSION) // 1000
        self.free_bytes, self.total_bytes = (int(n) for n in check(cu.cuMemGetInfo()))
        self._merge: dict[str, Any] = {}
        # Making an event takes longer than recording it: those that nobody looks at serve again.
        self._idle: tuple[list[Any], list[Any]] = ([], [])

    def use(self) -> None:
        """Make it current in this thread."""
        self._device.set_current()

    # -- memory ------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Take device memory; 0 when there is none."""
        result, address = cu.cuMemAlloc(nbytes)
        if result == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return 0
        check((result,))
        return int(address)

    def release(self, address: int) -> None:
        """Give back what `allocate` took."""
        check(cu.cuMemFree(address))

    def available(self) -> int:
        """Count the free bytes of the GPU, whoever may take them."""
        return int(check(cu.cuMemGetInfo())[0])

    def pinned(self, nbytes: int) -> int:
        """Take host memory that copies can read and write while the host goes on."""
        return int(check(cu.cuMemHostAlloc(nbytes, cu.CU_MEMHOSTALLOC_PORTABLE)))

    def release_pinned(self, address: int) -> None:
        """Give back what `pinned` took."""
        check(cu.cuMemFreeHost(address))

    # -- streams and events ------------------------------------------------------------------------

    def stream(self, urgency: int = 0) -> Any:
        """Make a stream; where several have work, that of the most urgent (up to 5) goes first."""
        return self._device.create_stream(options=StreamOptions(priority=-urgency))

    def record(self, stream: Any, *, timed: bool = False) -> Event:
        """Mark this place in `stream`; timed ones give milliseconds by ``-``."""
        idle = self._idle[timed]
        if idle:
            made = idle.pop()
            stream.record(made)
        else:
            made = stream.record(options=TIMED if timed else UNTIMED)
        return Event(made, idle)

    def wait(self, stream: Any, event: Event) -> None:
        """Let what follows in `stream` come after `event`."""
        stream.wait(event.made)

    def adopt(self, handle: int) -> Any:
        """Wrap a stream of another library."""
        return type(self._device.default_stream).from_handle(handle)

    def synchronize(self) -> None:
        """Wait for everything on this GPU."""
        self._device.sync()

    # -- graphs ------------------------------------------------------------------------------------

    def begin_capture(self, stream: Any) -> None:
        """Do nothing of what `stream` is given from now on, nor streams that wait for it: note it.

        They may wait for nothing that isn't captured with them, and all join `stream` in the end.
        """
        # Relaxed: other threads go on making kernels ready, and libraries may take memory.
        relaxed = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        check(cu.cuStreamBeginCapture(stream.handle, relaxed))

    def end_capture(self, stream: Any) -> Any:
        """Return what was noted, ready to be launched.

        Raises
        ------
        DeviceError
            Something could not be captured; the streams are as they were before.

        """
        graph = check(cu.cuStreamEndCapture(stream.handle))
        try:
            made = check(cu.cuGraphInstantiate(graph, 0))
        finally:
            check(cu.cuGraphDestroy(graph))
        check(cu.cuGraphUpload(made, stream.handle))
        return made

    def launch(self, graph: Any, stream: Any) -> None:
        """Do what was noted, at this place of `stream`; not twice at a time."""
        check(cu.cuGraphLaunch(graph, stream.handle))

    def destroy(self, graph: Any) -> None:
        """Forget what was noted, once it isn't under way."""
        check(cu.cuGraphExecDestroy(graph))

    # -- copies, flags and fills -------------------------------------------------------------------

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy a run of bytes."""
        check(cu.cuMemcpyAsync(target, source, nbytes, stream.handle))

    def copy_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, row: int, rows: int, on: Any
    ) -> None:
        """Copy `rows` runs of `row` bytes that begin `pitch` bytes apart."""
        what = cu.CUDA_MEMCPY2D()
        what.srcMemoryType = what.dstMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        what.srcDevice, what.srcPitch = source, source_pitch
        what.dstDevice, what.dstPitch = target, pitch
        what.WidthInBytes, what.Height = row, rows
        check(cu.cuMemcpy2DAsync(what, on.handle))

    def fill(self, target: int, value: int, words: int, stream: Any) -> None:
        """Fill 32-bit words."""
        check(cu.cuMemsetD32Async(target, value, words, stream.handle))

    def raise_flag(self, address: int, value: int, stream: Any) -> None:
        """Write a 32-bit word, on any GPU, after everything before it in `stream` is visible."""
        check(cu.cuStreamWriteValue32(stream.handle, address, value, 0))

    def await_flag(self, address: int, value: int, stream: Any) -> None:
        """Hold `stream` until the word at `address` has come to `value` (modulo 2³²)."""
        at_least = cu.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        check(cu.cuStreamWaitValue32(stream.handle, address, value, int(at_least)))

    def take_flag(self, address: int, stream: Any) -> None:
        """Hold `stream` until the word at `address` is 1, then set it to 0: in one operation."""
        wait, write = cu.CUstreamBatchMemOpParams(), cu.CUstreamBatchMemOpParams()
        kinds = cu.CUstreamBatchMemOpType
        wait.operation = wait.waitValue.operation = kinds.CU_STREAM_MEM_OP_WAIT_VALUE_32
        wait.waitValue.address, wait.waitValue.value = cu.CUdeviceptr(address), 1
        wait.waitValue.flags = int(cu.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ)
        write.operation = write.writeValue.operation = kinds.CU_STREAM_MEM_OP_WRITE_VALUE_32
        write.writeValue.address, write.writeValue.value = cu.CUdeviceptr(address), 0
        write.writeValue.flags = int(cu.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT)
        check(cu.cuStreamBatchMemOp(stream.handle, 2, [wait, write], 0))

    # -- other processes ---------------------------------------------------------------------------

    def reaches(self, pci_bus_id: str) -> bool:
        """Whether this GPU can write into the memory of the visible GPU at `pci_bus_id`."""
        result, other = cu.cuDeviceGetByPCIBusId(pci_bus_id.encode())
        if result != cu.CUresult.CUDA_SUCCESS:
            return False
        if int(other) == self.ordinal:
            return True
        return bool(check(cu.cuDeviceCanAccessPeer(self.ordinal, other)))

    def ipc_handle(self, address: int) -> bytes:
        """Make a handle by which another process can open an allocation."""
        return bytes(check(cu.cuIpcGetMemHandle(address)).reserved)

    def open(self, handle: bytes) -> int:
        """Open another process's allocation; its address here."""
        remote = cu.CUipcMemHandle()
        remote.reserved = handle
        lazy = cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(check(cu.cuIpcOpenMemHandle(remote, int(lazy))))

    def close(self, address: int) -> None:
        """Close what `open` opened."""
        check(cu.cuIpcCloseMemHandle(address))

    # -- other libraries ---------------------------------------------------------------------------

    def view(self, array: Any, stream: Any | None) -> View:
        """Look at another library's array on this GPU.

        `stream` waits for what the library is still doing to it; None: something else does.
        """
        wait = -1 if stream is None else int(stream.handle)
        view = StridedMemoryView.from_any_interface(array, stream_ptr=wait)
        if not view.is_device_accessible or view.device_id != self.ordinal:
            raise RejectedError(
                f"an array on device {view.device_id}, where this rank has GPU {self.ordinal}",
                fix="put every rank's arrays on the GPU of its local rank",
            )
        strides = tuple(view.strides or contiguous_strides(view.shape))
        return View(view.ptr, tuple(view.shape), strides, np.dtype(view.dtype), (array, view))

    # -- the merge ---------------------------------------------------------------------------------

    def merge(self, call: MergeCall, stream: Any) -> None:
        """Launch the kernel of `merge`."""
        kernel = self._merge.get(call.kernel) or self._compile(call)
        numbers = call.words
        words = (ctypes.c_int64 * len(numbers))(*numbers)
        argument = ctypes.c_void_p(ctypes.addressof(words))
        grid, block, where = (call.grid, 1, 1), (*call.block, 1), ctypes.addressof(argument)
        check(cu.cuLaunchKernel(kernel, *grid, *block, 0, stream.handle, where, 0))

    def _compile(self, call: MergeCall) -> Any:
        options = ProgramOptions(arch=f"sm_{self._device.arch}", std="c++17")
        code = Program(call.source, code_type="c++", options=options).compile("cubin")
        module = check(cu.cuModuleLoadData(code.code))
        kernel = self._merge[call.kernel] = check(cu.cuModuleGetFunction(module, b"merge"))
        return kernel


class Event:
    """A place in a stream."""

    __slots__ = ("_done", "_idle", "made")

    def __init__(self, made: Any, idle: list[Any]) -> None:
        self.made = made
        self._done = False
        self._idle = idle

    def __del__(self) -> None:
        self._idle.append(self.made)

    @property
    def is_done(self) -> bool:
        """Whether everything before it is done."""
        self._done = self._done or self.made.is_done
        return self._done

    def sync(self) -> None:
        """Wait for it; any thread may."""
        self.made.sync()

    def __sub__(self, earlier: Event) -> float:
        """Milliseconds between two timed events that are done."""
        return float(self.made - earlier.made)


TIMED = EventOptions(timing_enabled=True)
UNTIMED = EventOptions(blocking_sync=True)


def version(number: int) -> str:
    """Write CUDA's 13020 as 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def check(result: Sequence[Any]) -> Any:
    """Take the value out of what a driver call returned.

    Raises
    ------
    DeviceError
        The call failed.

    """
    code, *values = result
    if code != cu.CUresult.CUDA_SUCCESS:
        name = cu.cuGetErrorName(code)[1].decode()
        text = cu.cuGetErrorString(code)[1].decode()
        raise DeviceError(f"CUDA: {name}: {text}", fix=FIXES.get(name, ""))
    return values[0] if len(values) == 1 else tuple(values)


FIXES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "use more ranks, or -s ring, which holds 1/P of K and V",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "install the driver and libraries of one CUDA release",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the NVIDIA driver",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "this GPU is broken: start again on another node",
}
