"""Engines at run time: shared by a group, loaded, connected; what executors have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Event, Timer
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mdattn_mpi.devices.nccl import NcclComm, loaded_nccl
from mdattn_mpi.devices.presence import gpu_count
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.lockstep import Group, together
from mdattn_mpi.trt.build import BuiltEngine
from mdattn_mpi.trt.choice import check_target
from mdattn_mpi.trt.engine import Engine
from mdattn_mpi.trt.gpu import Buffer, GpuContext, HostArray
from mdattn_mpi.trt.library import (
    INSTALL,
    Library,
    check_one_nccl,
    find_library,
    show_sm,
)
from mdattn_mpi.trt.store import Manifest, check_fits, read_engine, read_known, sha256_of
from mdattn_mpi.trt.versions import fault_named

HANDSHAKE: Final = 120.0  # seconds for all ranks to give an engine its communicator


class Communicator(Protocol):
    """The NCCL communicator of a group."""

    @property
    def ptr(self) -> int:
        """Its ``ncclComm_t``."""

    def close(self) -> None:
        """Collective. Destroy it."""

    def abort(self) -> None:
        """Release it; wait for no other rank."""


class Runtime:
    """The ranks of a group, one a GPU, and what their engines need.

    Parameters
    ----------
    group
        The ranks.
    library, gpu, communicator
        This rank's TensorRT and GPU, and the group's NCCL communicator.
    nccl
        Tells which NCCL libraries the process has loaded.

    """

    def __init__(
        self,
        group: Group,
        library: Library,
        gpu: GpuContext,
        communicator: Communicator,
        nccl: Callable[[], Sequence[str]] = loaded_nccl,
    ) -> None:
        self.group = group
        self.library = library
        self.gpu = gpu
        self._communicator = communicator
        self._nccl = nccl
        self.engines: list[Engine] = []  # that are loaded

    def share(self, phase: str, make: Callable[[], BuiltEngine]) -> BuiltEngine:
        """Collective. Make an engine on rank 0 and give it to all; its failure is everyone's."""
        group = self.group
        built = together(group, phase, lambda: make() if group.rank == 0 else None)
        listed = group.bcast_bytes(built.manifest.to_json() if built else None)
        engine = group.bcast_large(built.engine if built else None)
        known = group.bcast_large(built.known if built else None)
        return BuiltEngine(engine, Manifest.from_json(listed, Path(phase)), known=known)

    def share_file(self, path: Path) -> BuiltEngine:
        """Collective. Read an engine on rank 0 and give it to all; refuse one that doesn't fit."""

        def fits() -> None:
            check_fits(built.manifest, self.library, self.gpu.sm, self.group.size, str(path))

        def read() -> BuiltEngine:
            engine, manifest = read_engine(path)
            return BuiltEngine(engine, manifest, known=read_known(path, manifest))

        built = self.share("engine file", read)
        together(self.group, "engine fits", fits)
        return built

    def load(self, built: BuiltEngine) -> Engine:
        """Collective. Deserialize on all ranks, then connect all at once.

        Raises
        ------
        DisagreementError, DeviceError
            Ranks hold different engines; one can't load it, or uses another NCCL.

        """
        group, manifest = self.group, built.manifest
        digest = sha256_of(built.engine)

        def deserialize() -> Engine:
            if digest != manifest.sha256:
                raise DeviceError("the engine's bytes changed on their way", fix="start again")
            check_target(self.library, manifest.strategy, manifest.ranks, self.gpu.sm)
            return Engine(self.library, built, self.gpu.sm)

        facts = {"engine": digest, "library": str(self.library), "SM": show_sm(self.gpu.sm)}
        together(group, "engine", lambda: facts, dict)  # before anyone deserializes
        engine = together(group, "load engine", deserialize)
        if group.size > 1:
            together(group, "NCCL", lambda: check_one_nccl(self._nccl()))
            together(group, "connect engine", lambda: self._connect(engine))
            together(group, "NCCL again", lambda: check_one_nccl(self._nccl()))
        self.engines.append(engine)
        return engine

    def _connect(self, engine: Engine) -> None:
        """Collective. Give the engine the group's communicator; end a handshake that hangs.

        The call returns when all ranks are in it. Each group has a communicator of its own: no
        engine has to pick its ranks out of a larger one, which some versions don't do.
        """
        aborted = Event()

        def abort() -> None:
            aborted.set()
            self._communicator.abort()

        timer = Timer(HANDSHAKE, abort)
        timer.daemon = True
        timer.start()
        try:
            engine.connect(self._communicator.ptr)
        except DeviceError as error:
            if not aborted.is_set():
                raise
            fault = fault_named("sequential handshake")
            raise DeviceError(
                f"after {HANDSHAKE:.0f} s not all ranks were in it: {fault}", fix=fault.fix
            ) from error
        finally:
            timer.cancel()

    def describe(self) -> dict[str, str]:
        """The GPU, the library, the engines."""
        return {
            "device": f"{self.gpu.name} (SM {show_sm(self.gpu.sm)})",
            self.library.flavour: self.library.version,
            "engines": ", ".join(engine.manifest.sha256[:12] for engine in self.engines),
        }

    def close(self) -> None:
        """Collective. Engines before the communicator that they hold, memory last."""
        for engine in self.engines:
            engine.close()
        self.engines.clear()
        self._communicator.close()
        self.gpu.close()

    def abort(self) -> None:
        """Abort the communicator, so that nothing on the GPU waits for a rank that is gone."""
        self._communicator.abort()


@dataclass(frozen=True)
class EngineDownload:
    """Outputs on their way to the host."""

    arrays: tuple[HostArray, ...]
    events: tuple[Any, ...]
    finished: Callable[[], None]

    def wait(self) -> tuple[HostArray, ...]:
        """Return the arrays; any thread may call."""
        for event in self.events:
            event.sync()
        self.finished()
        return self.arrays


class Result(NamedTuple):
    """An output of an engine: its shape there, and that of the rank's own rows, the first."""

    name: str
    shape: tuple[int, ...]
    own: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass
class Execution:
    """One run of an engine, from `begin` to `collect`."""

    engine: Engine
    shapes: Mapping[str, tuple[int, ...]]  # of the inputs, as the engine takes them
    host_inputs: dict[str, npt.NDArray[np.int64]]  # read until the engine is done
    results: tuple[Result, ...]
    buffers: dict[str, Buffer]  # of inputs and results
    marks: tuple[Any, Any] | None = None


class EngineExecutor:
    """What executors of attention and of models have in common: an engine's way with an item."""

    name = "tensorrt"

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._group = runtime.group
        self._gpu = runtime.gpu
        self._timings = {"compute": 0.0, "exchange": 0.0, "merge": 0.0}

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """An array for `begin`, with undefined contents."""
        return np.empty(shape, dtype)

    def _begin(
        self,
        engine: Engine,
        shapes: Mapping[str, tuple[int, ...]],
        shards: Sequence[HostArray],
        host_inputs: Mapping[str, int],
        results: tuple[Result, ...],
    ) -> Execution:
        """Start the upload of the rank's shards, filled up to the shapes that the engine takes."""
        buffers = {}
        for (name, shape), shard in zip(shapes.items(), shards, strict=True):
            buffers[name] = self._gpu.buffer(prod(shape) * shard.itemsize)
            self._gpu.upload(shard, buffers[name])
        for result in results:
            buffers[result.name] = self._gpu.buffer(prod(result.shape) * result.dtype.itemsize)
        held = {name: np.array([number], np.int64) for name, number in host_inputs.items()}
        return Execution(engine, shapes, held, results, buffers)

    def enqueue(self, execution: Execution) -> None:
        """Collective. Bind the buffers and enqueue."""
        engine, buffers = execution.engine, execution.buffers
        for name, shape in execution.shapes.items():
            engine.set_shape(name, shape)
            engine.bind(name, buffers[name].address)
        for name, values in execution.host_inputs.items():
            engine.bind(name, values.ctypes.data)
        self._check(execution)
        for result in execution.results:
            engine.bind(result.name, buffers[result.name].address)
        self._gpu.uploads_before_compute()
        before = self._gpu.mark()
        engine.enqueue(self._gpu.stream)
        execution.marks = (before, self._gpu.mark())

    def _blank(self, execution: Execution) -> None:
        """Fill the results with NaN: what isn't written must not look like an answer."""
        for result in execution.results:
            if result.dtype.kind not in "iub":
                nothing = np.full(result.shape, np.nan, result.dtype)
                self._gpu.upload(nothing, execution.buffers[result.name])

    def _check(self, execution: Execution) -> None:
        """Look at what comes out, now that the inputs are bound."""

    def collect(self, execution: Execution) -> EngineDownload:
        """Start bringing the rank's own rows of every result to the host."""
        buffers, marks = execution.buffers, execution.marks
        assert marks is not None
        arrived = [
            self._gpu.download(buffers[result.name], result.own, result.dtype, marks[1])
            for result in execution.results
        ]

        def finished() -> None:
            self._timings["compute"] += self._gpu.seconds(*marks)
            for buffer in buffers.values():
                self._gpu.give_back(buffer)

        arrays, events = zip(*arrived, strict=True)
        return EngineDownload(arrays, events, finished)

    def timings(self) -> Mapping[str, float]:
        """Seconds of the engines; what they spend on exchange is part of ``compute``."""
        return dict(self._timings)

    def describe(self) -> Mapping[str, str]:
        """The GPU, the library, the engines."""
        return self._runtime.describe()

    def close(self) -> None:
        """Collective. Release everything, in order."""
        self._runtime.close()

    def abort(self) -> None:
        """Abort the communicator; wait for no other rank."""
        self._runtime.abort()


def open_runtime(group: Group) -> Runtime:
    """Collective. Open TensorRT, a GPU and an NCCL communicator on every rank.

    Raises
    ------
    RejectedError, DeviceError
        TensorRT, CUDA or NCCL is missing on some rank.

    """
    library = together(group, "TensorRT", find_library)
    gpu = together(group, "GPU", lambda: _open_gpu(group.local_rank, group.local_size))
    # nccl4py before any engine: TensorRT then finds its libnccl.so.2 in the process. Blocking,
    # because TensorRT's calls on the communicator must not return early.
    return Runtime(group, library, gpu, NcclComm(group, blocking=True))


def _open_gpu(local_rank: int, local_size: int) -> GpuContext:
    count = gpu_count()
    if local_rank >= count:
        what = f"{local_size} ranks on this node and {count} visible GPUs"
        raise DeviceError(
            what if count > 0 else "no NVIDIA GPU, or no driver for it, is here",
            fix="start at most as many ranks a node as it has GPUs, or use -b cpu; engines can be "
            "built without a GPU: mdattn build",
        )
    try:
        from mdattn_mpi.devices.cuda.driver import Gpu
    except ImportError as error:
        raise RejectedError(f"CUDA's Python packages are missing ({error})", fix=INSTALL) from error
    return GpuContext(Gpu(local_rank))
