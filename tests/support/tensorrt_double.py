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
from threading import Event
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
from tests.support.network_interpreter import (
    MpiRanks,
    Ranks,
    attention,
    interpret,
    recorded,
    softmax,
)

POINTER = 0x5EED


@dataclass
class Tape:
    """What was called, in order; and what goes wrong."""

    calls: list[Any] = field(default_factory=list)
    words: str = ""
    refuses: str = ""  # deserialize, context, communicator, enqueue
    lies: str = ""  # see `Double`

    def note(self, name: str, *values: Any) -> None:
        self.calls.append((name, *values))

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


class Context:
    def __init__(self, double: Double, spec: EngineSpec) -> None:
        self._double, self._spec = double, spec
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._connected = False

    def set_communicator(self, capsule: Any) -> bool:
        """Return when all ranks are in it, as the library does; or when it is aborted."""
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._double.tape.note("set_communicator", get(capsule, b"ncclComm_t"))
        met = self._double.comm.Ibarrier()
        while not met.Test():
            if self._double.aborted.wait(0.001):
                return False
        if self._double.fails("communicator"):
            return False
        self._connected = self._double.tape.lies != "lost communicator"
        return True

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
        result = self._double.interpret(self._spec, inputs, self._connected)
        if self._double.tape.lies == "nothing is written":
            return True
        if self._double.tape.lies == "zeros":
            result = np.zeros_like(result)
        _view(self._addresses["output"], result.shape, dtype)[:] = result
        return True


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """The array at a host address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


class AttentionEngine:
    """Stands for the engine of an `EngineSpec`."""

    def __init__(self, double: Double, spec: EngineSpec) -> None:
        self._double, self._spec = double, spec
        if double.tape.lies == "says single device":
            self.is_multi_device = False

    def create_execution_context(self) -> Any:
        self._double.tape.note("context")
        return None if self._double.fails("context") else Context(self._double, self._spec)

    def create_engine_inspector(self) -> Any:
        names = [
            f"{kind} of layer {number}"
            for kind, count in self._spec.collectives.items()
            for number in range(count)
        ]
        left_out = self._double.tape.lies == "collectives left out"
        layers = [{"Name": "attention"}, *({"Name": name} for name in names[left_out:])]
        information = json.dumps({"Layers": layers})
        return SimpleNamespace(get_engine_information=lambda _: information)


class Silent:
    """Ranks whose collectives do nothing, without a word: a rank finds its own numbers there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_gather(self, array: Any) -> list[Any]:
        return [array] * self.size


class Ungrouped(MpiRanks):
    """Collectives of a group that take in the first ranks of the job, whatever the group is."""

    def __init__(self, world: Any, group: Any) -> None:
        super().__init__(world)
        self.rank, self.size, self._all = group.rank, group.size, world.size

    def all_gather(self, array: Any) -> list[Any]:
        size, self.size = self.size, self._all
        try:
            return super().all_gather(array)[:size]
        finally:
            self.size = size


class Double:
    """Stands for the TensorRT module; only ``Runtime`` is not the real one's.

    It lies as the library was seen to (`Tape.lies`): "single device" (collectives do nothing),
    "lost communicator", "groups" (see `Ungrouped`), "fp16" (sums in FP16), and as it might: "says
    single device", "collectives left out", "nothing is written", "zeros", "another model".
    """

    def __init__(self, real: Library, comm: Any, version: str = "", world: Any = None) -> None:
        self.real, self.comm, self.world = real, comm, world
        self.version = version  # of full TensorRT, which it then claims to be
        self.tape = Tape()
        self.aborted = Event()
        self._sink: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real.api, name)

    def library(self) -> Library:
        if self.version:
            return Library("tensorrt", self.version, self)
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
        return AttentionEngine(self, EngineSpec.from_facts(json.loads(bytes(serialized))))

    def interpret(self, spec: EngineSpec, inputs: Any, connected: bool) -> Any:
        api = self.real.api
        builder = api.Builder(api.Logger(api.Logger.ERROR))
        with recorded(api) as collectives:
            network = define(self.library(), builder, spec)
        layers = {"ATTENTION_INPUT": attention_in_fp16} if self.tape.lies == "fp16" else {}
        return interpret(api, network, inputs, self.ranks(connected), collectives, layers)["output"]

    def ranks(self, connected: bool) -> Ranks:
        if not connected or self.tape.lies == "single device":
            return Silent(self.comm.rank, self.comm.size)
        if self.tape.lies == "groups":
            return Ungrouped(self.world, self.comm)
        return MpiRanks(self.comm)


def attention_in_fp16(layer: Any, query: Any, key: Any, value: Any) -> Any:
    """Attend as a kernel does that sums 16 products at a time in FP16, if its inputs are FP16."""
    if query.dtype != np.float16:
        return attention(layer, query, key, value)
    if layer.attention.num_ranks > 1:
        key, value = (np.concatenate(layer.ranks.all_gather(x), axis=2) for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (np.repeat(array, groups, axis=1).astype(np.float64) for array in (key, value))
    scores = _summed_in_fp16(query.astype(np.float64), key.swapaxes(-1, -2)).astype(np.float64)
    rows, columns = scores.shape[-2:]
    kind = layer.attention.causal_kind.name
    if kind != "NONE":
        diagonal = columns - rows if kind == "LOWER_RIGHT" else 0
        scores[..., np.arange(columns) > np.arange(rows)[:, None] + diagonal] = -np.inf
    return _summed_in_fp16(softmax(scores).astype(np.float16).astype(np.float64), value)


def _summed_in_fp16(left: Any, right: Any) -> Any:
    total = np.float16(0)
    for start in range(0, left.shape[-1], 16):
        some = slice(start, start + 16)
        total = (total + left[..., some] @ right[..., some, :]).astype(np.float16)
    return total


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

    def create_engine_inspector(self) -> Any:
        return None  # as of a library that has none

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
        ranks = self._double.ranks(connected=True)
        found = interpret(self._api, self._network, inputs, ranks, collectives)
        if self._double.tape.lies == "nothing is written":
            return True
        factor = {"zeros": 0, "another model": 1.2}.get(self._double.tape.lies, 1)
        for name, right in found.items():
            result = (factor * right).astype(right.dtype)
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

    def __init__(self, double: Double) -> None:
        self._tape, self._aborted = double.tape, double.aborted

    def close(self) -> None:
        self._tape.note("communicator.close")

    def abort(self) -> None:
        self._tape.note("communicator.abort")
        self._aborted.set()


class DoubleRuntime(Runtime):
    """A runtime in which nothing but TensorRT's own and the GPU is a double."""

    def __init__(
        self,
        world: Any,
        real: Library,
        sm: tuple[int, int] = (12, 0),
        version: str = "",
        everyone: Any = None,
    ) -> None:
        self.double = Double(real, world.comm, version, everyone)
        self.tape = self.double.tape
        self.nccl = ["/nccl/lib/libnccl.so.2"]
        self.memory = HostGpu(self.tape, sm)
        super().__init__(
            world,
            self.double.library(),
            self.memory,
            HostCommunicator(self.double),
            nccl=lambda: self.nccl,
        )


class DoubleBackend(TensorRTBackend):
    """The backend, with engines that the double can run."""

    runtime_class = DoubleRuntime

    def __init__(
        self,
        world: Any,
        real: Library,
        sm: tuple[int, int] = (12, 0),
        engine: str = "",
        lies: str = "",
        **library: Any,
    ) -> None:
        runtime = self.runtime_class(world, real, sm, **library)
        runtime.tape.lies = lies
        self.tape, self.nccl, self.gpu = runtime.tape, runtime.nccl, runtime.memory
        self.built: list[EngineSpec] = []
        super().__init__(runtime, None, engine)

    def _builder(self, spec: EngineSpec) -> Callable[[], Any]:
        def build() -> Any:
            self.built.append(spec)
            engine = json.dumps(spec.facts()).encode()
            return BuiltEngine(engine, describe(engine, self._runtime.library, self.gpu.sm, spec))

        return build
