"""TensorRT's runtime and a GPU, recorded: for what only hardware could run.

The double "deserializes" the JSON of an `EngineSpec`, defines the real network of it, and at the
enqueue interprets that network on what lies at the addresses that were bound. Everything else is
the real library. So a test sees the order of calls, and whether the answer is right.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from mdattn_mpi.onnx.model import attribute_of
from mdattn_mpi.onnx.sharding import read_sharding
from mdattn_mpi.trt.backend import TensorRTBackend
from mdattn_mpi.trt.build import BuiltEngine
from mdattn_mpi.trt.gpu import Buffer, GpuContext
from mdattn_mpi.trt.library import Library
from mdattn_mpi.trt.networks import define
from mdattn_mpi.trt.runtime import Runtime
from mdattn_mpi.trt.spec import EngineSpec
from mdattn_mpi.trt.store import describe
from tests.support.network_interpreter import MpiRanks, interpret, recorded

POINTER = 0x5EED


@dataclass
class Tape:
    """What was called, in order; and what goes wrong."""

    calls: list[Any] = field(default_factory=list)
    words: str = ""
    refuses: str = ""  # deserialize, context, communicator, enqueue

    def note(self, name: str, *values: Any) -> None:
        self.calls.append((name, *values))

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


class Context:
    def __init__(self, double: Double, spec: EngineSpec) -> None:
        self._double, self._spec = double, spec
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_communicator(self, capsule: Any) -> bool:
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._double.tape.note("set_communicator", get(capsule, b"ncclComm_t"))
        return not self._double.fails("communicator")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._double.tape.note("set_input_shape", name, shape)
        extents = {"query": self._spec.q, "key": self._spec.kv, "value": self._spec.kv}
        self._shapes[name] = shape
        return extents[name].min <= shape[0] <= extents[name].max

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._double.tape.note("set_tensor_address", name)
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._double.tape.note("enqueue", stream)
        if self._double.fails("enqueue"):
            return False
        dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[self._spec.dtype]
        inputs = {name: _view(self._addresses[name], s, dtype) for name, s in self._shapes.items()}
        if self._spec.takes_keys:
            inputs["keys"] = _view(self._addresses["keys"], (1,), np.int64)
        result = self._double.interpret(self._spec, inputs)
        _view(self._addresses["output"], result.shape, dtype)[:] = result
        return True


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """The array at a host address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


class Double:
    """Stands for the TensorRT module; only ``Runtime`` is not the real one's."""

    def __init__(self, real: Library, comm: Any) -> None:
        self.real, self.comm = real, comm
        self.tape = Tape()
        self._sink: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real.api, name)

    def library(self) -> Library:
        return Library(self.real.flavour, self.real.version, self)

    def fails(self, what: str) -> bool:
        if self.tape.refuses != what:
            return False
        self._sink.log(self.real.api.ILogger.Severity.ERROR, self.tape.words)
        return True

    def Runtime(self, sink: Any) -> Any:
        self._sink = sink
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, serialized: bytes) -> Any:
        self.tape.note("deserialize", len(serialized))
        if self.fails("deserialize"):
            return None
        if bytes(serialized[:1]) != b"{":
            return ModelEngine(self, bytes(serialized))
        spec = EngineSpec.from_facts(json.loads(bytes(serialized)))

        def context() -> Any:
            self.tape.note("context")
            return None if self.fails("context") else Context(self, spec)

        return SimpleNamespace(create_execution_context=context)

    def interpret(self, spec: EngineSpec, inputs: Any) -> Any:
        api = self.real.api
        builder = api.Builder(api.Logger(api.Logger.ERROR))
        with recorded(api) as collectives:
            network = define(self.real, builder, spec)
        ranks = MpiRanks(self.comm)
        return interpret(api, network, inputs, ranks, collectives)["output"]


class ModelEngine:
    """Stands for the engine of a model, and its context; "serialized" it is the ONNX file."""

    longest = 1 << 20  # tokens a rank

    def __init__(self, double: Double, serialized: bytes) -> None:
        import onnx

        self._double = double
        self._api = double.real.api
        self._model = onnx.load_model_from_string(serialized)
        self._sharding = read_sharding(self._model, Path("double"))
        self._builder = self._api.Builder(self._api.Logger(self._api.Logger.ERROR))
        flag = 1 << int(self._api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._network = self._builder.create_network(flag)
        self._parser = self._api.OnnxParser(self._network, self._builder.logger)
        assert self._parser.parse(serialized)
        inputs = [self._network.get_input(i) for i in range(self._network.num_inputs)]
        self._inputs = {tensor.name: tensor for tensor in inputs}
        outputs = [self._network.get_output(i) for i in range(self._network.num_outputs)]
        self._tensors = {**self._inputs, **{tensor.name: tensor for tensor in outputs}}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.num_io_tensors = len(self._tensors)
        self.get_tensor_name = list(self._tensors).__getitem__

    def create_execution_context(self) -> Any:
        return self

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._api.TensorIOMode
        return mode.INPUT if name in self._inputs else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        declared = tuple(self._tensors[name].shape)
        if not self._shapes:
            return declared
        axes = self._sharding.axes
        (length,) = {shape[axes[each]] for each, shape in self._shapes.items()}
        places = enumerate(declared)
        return tuple(length if i == axes[name] else 1 if dim == -1 else dim for i, dim in places)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        declared = tuple(self._tensors[name].shape)
        return [
            tuple(length if dim == -1 else dim for dim in declared)
            for length in (1, self.longest, self.longest)
        ]

    def set_communicator(self, capsule: Any) -> bool:
        self._double.tape.note("set_communicator")
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._inputs if name not in self._addresses]

    def execute_async_v3(self, stream: int) -> bool:
        self._double.tape.note("enqueue", stream)
        dtypes = {self._api.float16: np.float16, self._api.int64: np.int64}
        inputs = {
            name: _view(self._addresses[name], self._shapes.get(name, (1,)), dtypes[tensor.dtype])
            for name, tensor in self._inputs.items()
        }
        collectives = {
            node.name: attribute_of(node, "collective_operation").decode().upper()
            for node in self._model.graph.node
            if node.op_type == "DistCollective"
        }
        ranks = MpiRanks(self._double.comm)
        found = interpret(self._api, self._network, inputs, ranks, collectives)
        for name, result in found.items():
            _view(self._addresses[name], result.shape, result.dtype)[:] = result
        return True


class HostGpu(GpuContext):
    """A "GPU" whose memory is the host's, full of junk where nothing was written."""

    name = "double"
    stream = 7

    def __init__(self, tape: Tape, sm: tuple[int, int] = (12, 0)) -> None:
        self._tape, self.sm = tape, sm
        self._memory: dict[int, Any] = {}
        self.lent = 0

    def buffer(self, size: int) -> Buffer:
        self.lent += 1
        memory = np.full(size, 0x41, np.uint8)
        self._memory[memory.ctypes.data] = memory
        return Buffer(memory.ctypes.data, size)

    def give_back(self, buffer: Buffer) -> None:
        self.lent -= 1
        del self._memory[buffer.address]

    def upload(self, host: Any, buffer: Buffer) -> None:
        self._tape.note("upload")
        memory = self._memory[buffer.address]
        raw = np.ascontiguousarray(host).view(np.uint8).reshape(-1)
        memory[: raw.size] = raw
        memory[raw.size :] = 0

    def uploads_before_compute(self) -> None:
        self._tape.note("wait for uploads")

    def mark(self) -> Any:
        return object()

    def download(self, buffer: Buffer, shape: Any, dtype: Any, after: Any) -> Any:
        self._tape.note("download")
        host = np.empty(shape, dtype)
        host.view(np.uint8).reshape(-1)[:] = self._memory[buffer.address][: host.nbytes]
        return host, SimpleNamespace(sync=lambda: None)

    def seconds(self, first: Any, second: Any) -> float:
        return 0.25

    def close(self) -> None:
        self._tape.note("gpu.close")


class HostCommunicator:
    ptr = POINTER

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def close(self) -> None:
        self._tape.note("communicator.close")

    def abort(self) -> None:
        self._tape.note("communicator.abort")


class DoubleRuntime(Runtime):
    """A runtime in which nothing but TensorRT's own and the GPU is a double."""

    def __init__(self, world: Any, real: Library, sm: tuple[int, int] = (12, 0)) -> None:
        self.double = Double(real, world.comm)
        self.tape = self.double.tape
        self.nccl = ["/nccl/lib/libnccl.so.2"]
        self.memory = HostGpu(self.tape, sm)
        super().__init__(
            world,
            self.double.library(),
            self.memory,
            HostCommunicator(self.tape),
            nccl=lambda: self.nccl,
        )


class DoubleBackend(TensorRTBackend):
    """The backend, with engines that the double can run."""

    def __init__(
        self, world: Any, real: Library, sm: tuple[int, int] = (12, 0), engine: str = ""
    ) -> None:
        runtime = DoubleRuntime(world, real, sm)
        self.tape, self.nccl, self.gpu = runtime.tape, runtime.nccl, runtime.memory
        self.built: list[EngineSpec] = []
        super().__init__(runtime, None, engine)

    def _builder(self, spec: EngineSpec) -> Callable[[], Any]:
        def build() -> Any:
            self.built.append(spec)
            engine = json.dumps(spec.facts()).encode()
            return BuiltEngine(engine, describe(engine, self._runtime.library, self.gpu.sm, spec))

        return build
