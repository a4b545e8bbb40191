"""The backend ``tensorrt``: which engine for which problem, and an item's way through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.lockstep import Group, together
from mdattn_mpi.partition import equal_partition
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName
from mdattn_mpi.trt.build import BuiltEngine, make_attention
from mdattn_mpi.trt.choice import choose, spec_for
from mdattn_mpi.trt.engine import Engine
from mdattn_mpi.trt.gpu import HostArray
from mdattn_mpi.trt.networks import network_of
from mdattn_mpi.trt.runtime import (
    EngineDownload,
    EngineExecutor,
    Result,
    Running,
    Runtime,
    open_runtime,
)
from mdattn_mpi.trt.spec import EngineSpec
from mdattn_mpi.trt.store import Cache


@dataclass(frozen=True)
class Loaded:
    """An engine that is ready on this rank."""

    spec: EngineSpec
    digest: str
    engine: Engine


class TensorRTBackend(EngineExecutor):
    """Multi-device engines of one group, one rank a GPU.

    Parameters
    ----------
    runtime
        Where engines are loaded.
    cache
        Where built engines are kept; None for nowhere.

    """

    def __init__(self, runtime: Runtime, cache: Cache | None) -> None:
        super().__init__(runtime)
        self._library = runtime.library
        self._cache = cache
        self._loaded: list[Loaded] = []
        self._named = False

    def take_engine(self, path: Path) -> None:
        """Collective. Run the attention engine in `path`, and no other.

        Raises
        ------
        RejectedError, DeviceError
            It isn't one of plain attention; see `Runtime.share_file`.

        """
        made = self._runtime.share_file(path)
        if not made.manifest.spec:
            raise RejectedError(
                "this engine was built from a model, not for plain attention",
                file=str(path),
                fix="bind its inputs and outputs: --bind NAME=items/*/DATASET:DIM",
            )
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
        specs = together(
            self._group,
            "choose engines",
            lambda: self._specs(problems, strategy),
            lambda specs: {"engines": [str(spec) for spec in specs]},
        )
        for spec in specs:
            if not self._named and self._find(spec) is None:
                self._load(self._runtime.share("build engine", self._builder(spec)))

    def _specs(self, problems: Iterable[AttentionProblem], strategy: str) -> list[EngineSpec]:
        """What the engines for `problems` must take; ranks with other libraries differ in it."""
        chosen: dict[StrategyName, list[AttentionProblem]] = {}
        for problem in dict.fromkeys(problems):
            with suppress(MdattnError):
                chosen.setdefault(self._choose(problem, strategy)[0], []).append(problem)
        return [
            spec
            for name, those in chosen.items()
            for spec in spec_for(those, name, self._group.size)
        ]

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

    def _builder(self, spec: EngineSpec) -> Callable[[], BuiltEngine]:
        return lambda: make_attention(self._library, spec, self._gpu.sm, self._cache)

    def _load(self, made: BuiltEngine) -> None:
        engine = self._runtime.load(made)
        self._loaded.append(Loaded(made.manifest.attention(), made.manifest.sha256, engine))

    def begin(self, plan: Plan, *shards: HostArray) -> Running:
        """Start the upload of the rank's shards, filled up to what the engine takes."""
        group = self._group
        loaded = next(each for each in self._loaded if each.digest == plan.engine_digest)
        shapes = network_of(plan.strategy).shapes(plan.problem, group.size, group.rank)
        spec, query = loaded.spec, shards[0]
        inputs = {
            "query": (shapes.q, spec.q_heads, spec.head_dim),
            "key": (shapes.kv, spec.kv_heads, spec.head_dim),
            "value": (shapes.kv, spec.kv_heads, spec.head_dim),
        }
        output = Result("output", inputs["query"], query.shape, query.dtype)
        keys = {"keys": shapes.keys} if spec.takes_keys else {}
        return self._begin(loaded.engine, inputs, shards, keys, (output,))

    def collect(self, running: Running) -> EngineDownload:
        """Start bringing the output ``[Sq, Nq, H]`` to the host; its LSE is NaN."""
        download = super().collect(running)
        (output,) = download.arrays
        return replace(download, arrays=(output, np.full(output.shape[:2], np.nan, np.float32)))

    def describe(self) -> Mapping[str, str]:
        """The GPU, the library, the engines."""
        engines = ", ".join(loaded.digest[:12] for loaded in self._loaded)
        return {**self._runtime.describe(), "engines": engines}


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
    backend = TensorRTBackend(open_runtime(group), Cache.default())
    if engine:
        backend.take_engine(Path(engine))
    return backend
