"""One engine at run time: deserialize, connect, bind, enqueue.

All calls to TensorRT's runtime are here, in the order that multi-device execution asks for:
communicator on all ranks at once, then shapes and addresses, then the enqueue. What the library
says is believed: an error in its log is one, whatever the call returned.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.trt.build import BuiltEngine
from mdattn_mpi.trt.inspection import missing_collectives
from mdattn_mpi.trt.library import SM, Library, Log, show_sm, uncollected
from mdattn_mpi.trt.versions import fault_named

CAPSULE = b"ncclComm_t"
# What Python may call the question; 11.3 and RTX 1.7.1 answer it in C++ only, to themselves.
MULTI_DEVICE = ("is_md_engine", "is_multi_device", "is_multi_device_engine")


def communicator_capsule(pointer: int) -> Any:
    """Wrap an ``ncclComm_t`` as TensorRT's Python API takes it."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(pointer, CAPSULE, None)


class Engine:
    """A deserialized engine with one execution context.

    Raises
    ------
    DeviceError
        The engine can't run on this GPU or with this library.

    """

    @uncollected()
    def __init__(self, library: Library, built: BuiltEngine, sm: SM) -> None:
        self.manifest = built.manifest
        self._library = library
        self._log = Log(library)
        self._sm = sm
        self._runtime = library.api.Runtime(self._log.sink)
        self._engine = self._runtime.deserialize_cuda_engine(built.engine)
        if self._engine is None:
            raise self._cannot_run("TensorRT can't load the engine")
        self._context = self._engine.create_execution_context()
        self._connected: Any = None  # the context that has the communicator: a new one has none
        if self._context is None:
            raise self._cannot_run("TensorRT can't make an execution context")
        if self.manifest.ranks > 1:
            self._check_multi_device()

    def _cannot_run(self, what: str) -> DeviceError:
        return self._log.error(
            f"{what} on a GPU of SM {show_sm(self._sm)} with {self._library}",
            fix="use -b cuda; or an engine built for this SM by the same library; or full "
            "TensorRT, which has collectives since SM 8.0 and multi-device attention since SM 10.0",
        )

    def _check_multi_device(self) -> None:
        """Ask what can be asked before there is a communicator: is it an engine of many GPUs?"""
        fault = fault_named("single-device engine")
        for name in MULTI_DEVICE:
            answer = getattr(self._engine, name, True)
            if not (answer() if callable(answer) else answer):
                raise DeviceError(
                    f"{self._library} loads the engine as one of a single device: {fault}",
                    fix=fault.fix,
                )
        missing = missing_collectives(self.manifest.collectives, self._information())
        if missing:
            told = ", ".join(f"{count} {kind}" for kind, count in missing.items())
            raise DeviceError(
                f"the engine lacks {told} of its network: {self._library} left them out",
                fix=fault.fix,
            )

    def _information(self) -> str:
        """Ask the inspector, which some builds don't have."""
        inspector = self._engine.create_engine_inspector()
        layout = self._library.api.LayerInformationFormat.JSON
        return str(inspector.get_engine_information(layout)) if inspector else ""

    @uncollected()
    def connect(self, pointer: int) -> None:
        """Collective. Give it the NCCL communicator at `pointer`; returns when all ranks have."""
        self._log.clear()
        taken = self._context.set_communicator(communicator_capsule(pointer))
        if not taken or self._log.complains:
            raise self._log.error(
                "TensorRT refused the NCCL communicator",
                fix="let TensorRT find the libnccl.so.2 that nccl4py loads: put its folder first "
                "in LD_LIBRARY_PATH",
            )
        self._connected = self._context

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return self._names(self._library.api.TensorIOMode.INPUT)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return self._names(self._library.api.TensorIOMode.OUTPUT)

    def _names(self, mode: Any) -> tuple[str, ...]:
        engine = self._engine
        names = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
        return tuple(name for name in names if engine.get_tensor_mode(name) == mode)

    def declared_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, -1 for a dynamic dim."""
        return tuple(self._engine.get_tensor_shape(name))

    def extent(self, name: str, dim: int) -> tuple[int, int]:
        """Return the shortest and the longest that a dim of an input may be."""
        shortest, _, longest = self._engine.get_tensor_profile_shape(name, 0)
        return shortest[dim], longest[dim]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the dtype of a tensor; refuse one that a file can't hold."""
        found = self._engine.get_tensor_dtype(name)
        api = self._library.api
        known = {
            api.bfloat16: np.dtype(bfloat16),
            api.float16: np.dtype(np.float16),
            api.float32: np.dtype(np.float32),
            api.int64: np.dtype(np.int64),
            api.int32: np.dtype(np.int32),
        }
        if found not in known:
            raise RejectedError(
                f"{name!r} of the engine is {found}",
                fix="export the model with inputs and outputs in BF16, FP16, FP32, INT64 or INT32",
            )
        dtype: np.dtype[Any] = known[found]
        return dtype

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Say how large an input is."""
        self._check(self._context.set_input_shape(name, shape), f"input {name!r} of shape {shape}")

    def bind(self, name: str, address: int) -> None:
        """Bind a tensor to memory, which must outlive the enqueue: shape inputs on the host."""
        self._check(self._context.set_tensor_address(name, address), f"the address of {name!r}")

    def output_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an output; refuse to while an input isn't bound."""
        missing = self._context.infer_shapes()
        if missing:
            raise RejectedError(
                f"the engine's inputs {', '.join(missing)} are bound to nothing",
                fix="bind each input to a dataset: NAME=items/*/DATASET:DIM",
            )
        return tuple(self._context.get_tensor_shape(name))

    def enqueue(self, stream: int) -> None:
        """Collective. Put the engine's work on `stream`.

        A context without a communicator would compute something, and wrong: it isn't used.
        """
        if self.manifest.ranks > 1 and self._connected is not self._context:
            fault = fault_named("lost communicator")
            raise DeviceError(f"an execution context without communicator: {fault}", fix=fault.fix)
        self._check(self._context.execute_async_v3(stream), "the enqueue")

    def _check(self, done: bool, what: str) -> None:
        if not done or self._log.complains:
            raise self._log.error(
                f"TensorRT refused {what}", fix="build the engine for these lengths"
            )
        self._log.clear()

    def close(self) -> None:
        """Release it: context before engine before runtime."""
        for part in ("_context", "_engine", "_runtime"):
            if hasattr(self, part):
                delattr(self, part)
