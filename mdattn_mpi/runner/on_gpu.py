"""Segments of an ONNX model on a GPU: ONNX Runtime's CUDA provider, beside our own device.

Nothing comes to the host between two segments: ONNX Runtime computes in one stream that the device
lends it, so who waits for whom is what `devices.cuda.interop` says of any library that shows its
stream. The host waits only while a session gives back what it no longer needs, as the driver does.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.dlpack import Borrowed
from mdattn_mpi.devices.cuda.memory import DeviceArray
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import import_onnx
from mdattn_mpi.onnx.segments import import_onnxruntime

CUDA = "CUDAExecutionProvider"


class OnGpu:
    """A `segments.Place`: tensors are device arrays, or borrowed from ONNX Runtime.

    Parameters
    ----------
    device
        Of this rank; it stays the caller's.

    Raises
    ------
    RejectedError
        The ONNX Runtime that is installed has no CUDA.

    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._ordinal, self._stream = device.lend_stream()
        self._memory = "cuda", self._ordinal  # as ONNX Runtime calls it
        self._options = import_onnxruntime().RunOptions()
        self.providers = self._providers()

    def _providers(self) -> Sequence[Any]:
        runtime = import_onnxruntime()
        known = runtime.get_available_providers()
        if CUDA not in known:
            raise RejectedError(
                f"the ONNX Runtime that is installed computes by {', '.join(known)}, not by CUDA",
                fix="pip uninstall onnxruntime, then pip install 'mdattn_mpi[fast-cuda]'; or use "
                "-b cpu",
            )
        with redirect_stdout(io.StringIO()):  # what is missing is told again by the first session
            runtime.preload_dlls()
        # The order of streams is kept by events; an arena a session may not keep the most that the
        # session ever needed.
        entries = {
            "disable_synchronize_execution_providers": "1",
            "memory.enable_memory_arena_shrinkage": f"gpu:{self._ordinal}",
        }
        for name, value in entries.items():
            self._options.add_run_config_entry(name, value)
        options = {
            "device_id": str(self._ordinal),
            "user_compute_stream": str(self._stream),
            "arena_extend_strategy": "kSameAsRequested",
        }
        return ((CUDA, options), "CPUExecutionProvider")

    def put(self, array: Any) -> Any:
        """Bring an array of NumPy's to the GPU."""
        return self._device.export(self._device.upload(array))

    def run(self, session: Any, names: list[str], given: Mapping[str, Any]) -> list[Any]:
        """Run a segment; return tensors that will be there in the order of the stream."""
        binding, kinds = session.io_binding(), import_onnx().helper
        for name, tensor in given.items():
            if isinstance(tensor, DeviceArray):
                kind = kinds.np_dtype_to_tensor_dtype(tensor.dtype)
                binding.bind_input(name, *self._memory, kind, tensor.shape, tensor.address)
            else:
                binding.bind_ortvalue_input(name, tensor.owner)
        for name in names:
            binding.bind_output(name, *self._memory)
        session.run_with_iobinding(binding, self._options)
        return [self._borrowed(value) for value in binding.get_outputs()]

    def _borrowed(self, value: Any) -> Borrowed:
        kind = np.dtype(import_onnx().helper.tensor_dtype_to_np_dtype(value.element_type()))
        return Borrowed(value.data_ptr(), tuple(value.shape()), kind, self._ordinal, value)

    def take(self, tensors: Sequence[Any]) -> list[Any]:
        """Bring tensors to the host."""
        arrays = [self._device.adopt(tensor) for tensor in tensors]
        return list(self._device.download(*arrays).wait())
