"""The backend ``tensorrt``: which engine for which problem, and an item's way through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mdattn_mpi.errors import DeviceError, MdattnError, RejectedError
from mdattn_mpi.lockstep import Group, Step
from mdattn_mpi.partition import equal_partition
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName, digest_of
from mdattn_mpi.trt.build import Made, make_attention
from mdattn_mpi.trt.choice import check_target, choose
from mdattn_mpi.trt.engine import Engine
from mdattn_mpi.trt.gpu import Buffer, CudaGpu, Gpu, HostArray
from mdattn_mpi.trt.library import (
    INSTALL,
    Library,
    check_one_nccl,
    find_library,
    loaded_nccl,
    show_sm,
)
from mdattn_mpi.trt.networks import network_of
from mdattn_mpi.trt.spec import EngineSpec, Shapes, spec_for
from mdattn_mpi.trt.store import Cache, Manifest, check_fits, read_engine, sha256_of

T = TypeVar("T")


class Communicator(Protocol):
    """The NCCL communicator of a group."""

    @property
    def ptr(self) -> int:
        """Its ``ncclComm_t``."""
        ...

    def close(self) -> None:
        """Collective. Destroy it."""
        ...

    def abort(self) -> None:
        """Let go without waiting for any other rank."""
        ...


@dataclass(frozen=True)
class Loaded:
    """An engine that is ready on this rank."""

    spec: EngineSpec
    digest: str
    engine: Engine


@dataclass
class Running:
    """An item between `begin` and `collect`."""

    plan: Plan
    loaded: Loaded
    shapes: Shapes
    rows: int
    buffers: dict[str, Buffer]
    keys: npt.NDArray[np.int64]
    dtype: np.dtype[Any]
    marks: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class TensorRTDownload:
    """An output shard on its way to the host."""

    output: HostArray
    arrived: Any
    finished: Callable[[], None]

    def wait(self) -> tuple[HostArray, HostArray]:
        """Return the output ``[Sq, Nq, H]``, and NaN for the LSE. Any thread may call."""
        self.arrived.sync()
        self.finished()
        return self.output, np.full(self.output.shape[:2], np.nan, np.float32)


class TensorRTBackend:
    """Multi-device engines of one group, one rank a GPU.

    Parameters
    ----------
    group
        The ranks.
    library, gpu, communicator
        This rank's TensorRT and GPU, and the group's NCCL communicator.
    cache
        Where built engines are kept; None for nowhere.
    nccl
        Tells which NCCL libraries the process has loaded.

    """

    name = "tensorrt"

    def __init__(
        self,
        group: Group,
        library: Library,
        gpu: Gpu,
        communicator: Communicator,
        cache: Cache | None,
        nccl: Callable[[], Sequence[str]] = loaded_nccl,
    ) -> None:
        self._group = group
        self._library = library
        self._gpu = gpu
        self._communicator = communicator
        self._cache = cache
        self._nccl = nccl
        self._loaded: list[Loaded] = []
        self._named = False
        self._timings = {"compute": 0.0, "exchange": 0.0, "merge": 0.0}

    def take_engine(self, path: Path) -> None:
        """Collective. Run the attention engine in `path`, and no other.

        Raises
        ------
        RejectedError, DeviceError
            See `store.read_engine` and `store.check_fits`.

        """

        def fits() -> None:
            check_fits(manifest, self._library, self._gpu.sm, self._group.size, str(path))

        made = self._share("engine file", lambda: _read_attention(path))
        manifest = made.manifest
        agreed(self._group, "engine fits", fits)
        self._load(made)
        self._named = True

    def prepare(self, problems: Iterable[AttentionProblem], strategy: str) -> None:
        """Collective. Build, share and load the engines of all `problems`: one a kind.

        A problem that no engine can do is left to `plan`, which says why.

        Raises
        ------
        DeviceError
            A build that failed, or an engine that some rank can't load.

        """
        chosen: dict[StrategyName, list[AttentionProblem]] = {}
        for problem in dict.fromkeys(problems):
            with suppress(MdattnError):
                chosen.setdefault(self._choose(problem, strategy)[0], []).append(problem)
        for name, group in chosen.items():
            for spec in spec_for(group, name, self._group.size):
                if not self._named and self._find(spec) is None:
                    self._load(self._share("build engine", self._builder(spec)))

    def plan(self, problem: AttentionProblem, strategy: str, *, lse: bool) -> Plan:
        """Collective. Choose strategy and engine; build one where `prepare` made none.

        Raises
        ------
        RejectedError, DeviceError
            With the reason and what can do it.

        """
        if lse:
            raise RejectedError(
                "TensorRT's attention gives no log-sum-exp", fix="leave --lse out, or use -b cuda"
            )
        name, reasons = self._choose(problem, strategy)
        self.prepare([problem], strategy)
        (spec,) = spec_for([problem], name, self._group.size)
        loaded = self._find(spec)
        if loaded is None:
            raise RejectedError(
                f"the engine is for {self._loaded[0].spec}, not for {problem}",
                fix="build one for this dataset: mdattn build DATA.h5",
            )
        return Plan(
            problem,
            name,
            self._group.size,
            self.name,
            engine_digest=loaded.digest,
            partition=equal_partition(problem, self._group.size),
            reasons=(*reasons, f"engine {loaded.digest[:12]} for {loaded.spec}"),
        )

    def _choose(
        self, problem: AttentionProblem, strategy: str
    ) -> tuple[StrategyName, tuple[str, ...]]:
        if self._named:
            name = self._loaded[0].spec.strategy
            if strategy not in ("auto", name):
                raise RejectedError(f"-s {strategy} with an engine of {name}", fix=f"use -s {name}")
            return name, ("the engine was named",)
        return choose(problem, strategy, self._group.size, self._library, self._gpu.sm)

    def _find(self, spec: EngineSpec) -> Loaded | None:
        return next((loaded for loaded in self._loaded if loaded.spec.includes(spec)), None)

    def _builder(self, spec: EngineSpec) -> Callable[[], Made]:
        return lambda: make_attention(self._library, spec, self._gpu.sm, self._cache)

    def _share(self, phase: str, make: Callable[[], Made]) -> Made:
        """Collective. Make an engine on rank 0 and give it to all; its failure is everyone's."""
        group = self._group
        made = agreed(group, phase, lambda: make() if group.rank == 0 else None)
        listed = group.bcast_bytes(made.manifest.to_json() if made else None)
        engine = group.bcast_large(made.engine if made else None)
        return Made(engine, Manifest.from_json(listed, Path(phase)))

    def _load(self, made: Made) -> None:
        """Collective. Deserialize on all ranks, then hand the communicator over on all at once."""
        engine, manifest = made.engine, made.manifest
        spec = manifest.attention()
        digest = sha256_of(engine)

        def load() -> Engine:
            if digest != manifest.sha256:
                raise DeviceError("the engine's bytes changed on their way", fix="start again")
            check_target(self._library, spec.strategy, spec.ranks, self._gpu.sm)
            return Engine(self._library, engine, self._gpu.sm)

        facts = {"engine": digest, "library": str(self._library), "SM": show_sm(self._gpu.sm)}
        agreed(self._group, "engine", lambda: None, facts)  # before anyone deserializes
        loaded = agreed(self._group, "load engine", load)
        if self._group.size > 1:
            pointer = self._communicator.ptr
            agreed(self._group, "NCCL", lambda: check_one_nccl(self._nccl()))
            agreed(self._group, "connect engine", lambda: loaded.connect(pointer))
            agreed(self._group, "NCCL again", lambda: check_one_nccl(self._nccl()))
        self._loaded.append(Loaded(spec, digest, loaded))

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """An array for `begin`, with undefined contents."""
        return np.empty(shape, dtype)

    def begin(self, plan: Plan, q: HostArray, k: HostArray, v: HostArray) -> Running:
        """Start the upload of the rank's shards, filled up to what the engine takes."""
        group, gpu = self._group, self._gpu
        loaded = next(each for each in self._loaded if each.digest == plan.engine_digest)
        shapes = network_of(plan.strategy).shapes(plan.problem, group.size, group.rank)
        buffers = {}
        rows = {"query": shapes.q, "key": shapes.kv, "value": shapes.kv}
        for (name, count), host in zip(rows.items(), (q, k, v), strict=True):
            buffers[name] = gpu.buffer(count * _row_size(host))
            gpu.upload(host, buffers[name])
        buffers["output"] = gpu.buffer(buffers["query"].size)
        keys = np.array([shapes.keys], np.int64)
        return Running(plan, loaded, shapes, len(q), buffers, keys, q.dtype)

    def enqueue(self, running: Running) -> None:
        """Collective. Bind the buffers and enqueue."""
        engine, spec, shapes = running.loaded.engine, running.loaded.spec, running.shapes
        for name, rows, heads in (
            ("query", shapes.q, spec.q_heads),
            ("key", shapes.kv, spec.kv_heads),
            ("value", shapes.kv, spec.kv_heads),
        ):
            engine.set_input(name, running.buffers[name].address, (rows, heads, spec.head_dim))
        if spec.takes_keys:
            engine.set_host_input("keys", running.keys)
        engine.set_output("output", running.buffers["output"].address)
        self._gpu.uploads_before_compute()
        before = self._gpu.mark()
        engine.enqueue(self._gpu.stream)
        running.marks = (before, self._gpu.mark())

    def collect(self, running: Running) -> TensorRTDownload:
        """Start bringing the output of an enqueued item to the host."""
        spec, buffers, marks = running.loaded.spec, running.buffers, running.marks
        assert marks is not None
        shape = (running.rows, spec.q_heads, spec.head_dim)
        output, arrived = self._gpu.download(buffers["output"], shape, running.dtype, marks[1])

        def finished() -> None:
            self._timings["compute"] += self._gpu.seconds(*marks)
            for buffer in buffers.values():
                self._gpu.give_back(buffer)

        return TensorRTDownload(output, arrived, finished)

    def describe(self) -> Mapping[str, str]:
        """The GPU, the library, the engines."""
        return {
            "device": f"{self._gpu.name} (SM {show_sm(self._gpu.sm)})",
            self._library.flavour: self._library.version,
            "engines": ", ".join(loaded.digest[:12] for loaded in self._loaded),
        }

    def timings(self) -> Mapping[str, float]:
        """Seconds of the engines; what they spend on exchange is part of ``compute``."""
        return dict(self._timings)

    def close(self) -> None:
        """Collective. Engines before the communicator that they hold, memory last."""
        for loaded in self._loaded:
            loaded.engine.close()
        self._loaded.clear()
        self._communicator.close()
        self._gpu.close()

    def abort(self) -> None:
        """Let go of the communicator, so that nothing on the GPU waits for a rank that is gone."""
        self._communicator.abort()


def _row_size(host: HostArray) -> int:
    """Bytes of one token."""
    return int(host.shape[1] * host.shape[2] * host.itemsize)


def _read_attention(path: Path) -> Made:
    """Read an engine of plain attention, which its manifest describes."""
    engine, manifest = read_engine(path)
    if not manifest.spec:
        raise RejectedError(
            "this engine was built from a model, not for plain attention",
            file=str(path),
            fix="run it with --bind NAME=items/*/DATASET:DIM for each input and output",
        )
    return Made(engine, manifest)


def agreed(
    group: Group, phase: str, action: Callable[[], T], facts: Mapping[str, Any] | None = None
) -> T:
    """Collective. Do `action` on every rank; go on together, or raise the same error together.

    Raises
    ------
    MdattnError
        Of the lowest rank that failed.
    DisagreementError
        The ranks' `facts` differ; this is found out before any goes on.

    """
    error: MdattnError | None = None
    value: T | None = None
    try:
        value = action()
    except Exception as failure:
        error = MdattnError.wrap(failure, rank=group.rank)
    found = dict(facts or {})
    group.agree(Step(-1, phase, digest_of(found), lambda: found), error=error)
    return value  # type: ignore[return-value]


def open_tensorrt(group: Group, *, engine: str = "") -> TensorRTBackend:
    """Collective. Open TensorRT, a GPU and an NCCL communicator on every rank.

    Parameters
    ----------
    group
        The ranks, one a GPU.
    engine
        An engine file to run instead of what would be built.

    Raises
    ------
    RejectedError, DeviceError
        TensorRT, CUDA or NCCL is missing on some rank; or the engine file is refused.

    """
    library = agreed(group, "TensorRT", find_library)
    gpu = agreed(group, "GPU", lambda: _open_gpu(group.local_rank, group.local_size))
    # nccl4py first: TensorRT then finds its libnccl.so.2 already in the process.
    agreed(group, "nccl4py", _import_nccl)
    communicator = agreed(group, "NCCL", lambda: _open_nccl(group))
    backend = TensorRTBackend(group, library, gpu, communicator, Cache.default())
    if engine:
        backend.take_engine(Path(engine))
    return backend


def _open_gpu(local_rank: int, local_size: int) -> CudaGpu:
    from mdattn_mpi.devices.presence import gpu_count

    count = gpu_count()
    if local_rank >= count:
        what = f"{local_size} ranks on this node and {count} visible GPUs"
        raise DeviceError(
            what if count > 0 else "no NVIDIA GPU, or no driver for it, is here",
            fix="start at most as many ranks a node as it has GPUs, or use -b cpu; engines can be "
            "built without a GPU: mdattn build",
        )
    try:
        from mdattn_mpi.devices.cuda_driver import Gpu as Driver
    except ImportError as error:
        raise RejectedError(f"CUDA's Python packages are missing ({error})", fix=INSTALL) from error
    return CudaGpu(Driver(local_rank))


def _import_nccl() -> None:
    try:
        import_module("nccl.core")
    except ImportError as error:
        raise RejectedError(f"nccl4py can't be imported ({error})", fix=INSTALL) from error


def _open_nccl(group: Group) -> Communicator:
    """Collective. Make the communicator; TensorRT's calls on it must not return early."""
    from mdattn_mpi.devices.nccl_comm import NcclComm

    return NcclComm(group, blocking=True)
