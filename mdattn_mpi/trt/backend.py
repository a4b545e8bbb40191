"""The backend ``tensorrt``: which engine for which problem, and an item's way through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.lockstep import together
from mdattn_mpi.partition import equal_partition
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName
from mdattn_mpi.trt.build import BuiltEngine, make_attention
from mdattn_mpi.trt.choice import choose, spec_for
from mdattn_mpi.trt.engine import Engine
from mdattn_mpi.trt.gpu import HostArray
from mdattn_mpi.trt.networks import NETWORKS
from mdattn_mpi.trt.proof import KnownItem, Verdict, conclude, judge
from mdattn_mpi.trt.runtime import EngineDownload, EngineExecutor, Execution, Result, Runtime
from mdattn_mpi.trt.spec import EngineSpec
from mdattn_mpi.trt.store import Cache


class TensorRTBackend(EngineExecutor):
    """Collective. Attention engines of one group, one rank a GPU; none is used before its proof.

    Parameters
    ----------
    runtime
        Where engines are loaded.
    cache
        Where built engines are kept; None for nowhere.
    engine
        An engine file to run instead of what would be built.

    Raises
    ------
    RejectedError, DeviceError
        The engine file isn't one of plain attention; see `Runtime.share_file`.

    """

    def __init__(self, runtime: Runtime, cache: Cache | None, engine: str = "") -> None:
        super().__init__(runtime)
        self._cache = cache
        self._engines: list[Engine] = []  # that are proven
        self._proofs: dict[str, str] = {}  # what each cost, by SHA-256
        self._named = bool(engine)
        if not engine:
            return
        built = runtime.share_file(Path(engine))
        if not built.manifest.spec:
            raise RejectedError(
                "this engine was built from a model, not for plain attention",
                file=engine,
                fix="bind its inputs and outputs: --bind NAME=items/*/DATASET:DIM",
            )
        self._load(built)

    def _load(self, built: BuiltEngine) -> None:
        """Collective. Load an engine, and use it once it is proven."""
        engine = self._runtime.load(built)
        self._prove(engine)
        self._engines.append(engine)

    def _prove(self, engine: Engine) -> None:
        """Collective. Let an engine attend to known numbers; raise DeviceError if it's wrong."""
        group, manifest, began = self._group, engine.manifest, perf_counter()
        spec, seconds = manifest.attention(), dict(self._timings)
        ranks = group.allgather(group.world_rank)

        def begin() -> Execution:
            execution = self._start(engine, item.problem, *item.shards(group.rank))
            self._blank(execution)
            return execution

        def look() -> Verdict:
            (output,) = super(TensorRTBackend, self).collect(execution).wait()
            return judge(item, group.rank, output)

        item = together(group, "proof", lambda: KnownItem.of(spec, ranks, manifest.sha256))
        execution = together(group, "begin proof", begin)
        together(group, "enqueue proof", lambda: self.enqueue(execution))
        found = group.allgather(asdict(together(group, "judge proof", look)))
        verdicts = [Verdict(**each) for each in found]
        together(group, "proof", lambda: conclude(spec, self._runtime.library, ranks, verdicts))
        self._timings = seconds
        worst = max(verdict.error for verdict in verdicts)
        self._proofs[manifest.sha256] = (
            f"proven on {item.problem} in {perf_counter() - began:.2f} s, error {worst:.2f} of "
            "the tolerance"
        )

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
        """Collective. Choose strategy and engine; build one where `prepare` built none."""
        if lse:
            raise RejectedError(
                "TensorRT's attention gives no log-sum-exp", fix="leave --lse out, or use -b cuda"
            )
        name, reasons = self._choose(problem, strategy)
        self.prepare([problem], strategy)
        (spec,) = spec_for([problem], name, self._group.size)
        engine = self._find(spec)
        if engine is None:
            there = self._engines[0].manifest.attention()
            raise RejectedError(
                f"the engine is for {there}, not for {problem}",
                fix="build one for this dataset: mdattn build DATA.h5",
            )
        digest = engine.manifest.sha256
        return Plan(
            problem,
            name,
            self._group.size,
            self.name,
            engine_digest=digest,
            partition=equal_partition(problem, self._group.size),
            reasons=(
                *reasons,
                f"engine {digest[:12]} for {engine.manifest.attention()}, {self._proofs[digest]}",
            ),
        )

    def _choose(
        self, problem: AttentionProblem, strategy: str
    ) -> tuple[StrategyName, tuple[str, ...]]:
        if self._named:
            name = self._engines[0].manifest.attention().strategy
            if strategy not in ("auto", name):
                raise RejectedError(f"-s {strategy} with an engine of {name}", fix=f"use -s {name}")
            return name, ("the engine was named",)
        return choose(problem, strategy, self._group.size, self._runtime.library, self._gpu.sm)

    def _find(self, spec: EngineSpec) -> Engine | None:
        engines = self._engines
        return next((each for each in engines if each.manifest.attention().includes(spec)), None)

    def _builder(self, spec: EngineSpec) -> Callable[[], BuiltEngine]:
        return lambda: make_attention(self._runtime.library, spec, self._gpu.sm, self._cache)

    def begin(self, plan: Plan, *shards: HostArray) -> Execution:
        """Start the upload of the rank's shards, filled up to what the engine takes."""
        engines = self._engines
        engine = next(each for each in engines if each.manifest.sha256 == plan.engine_digest)
        return self._start(engine, plan.problem, *shards)

    def _start(self, engine: Engine, problem: AttentionProblem, *shards: HostArray) -> Execution:
        group, query, spec = self._group, shards[0], engine.manifest.attention()
        shapes = NETWORKS[spec.strategy].shapes(problem, group.size, group.rank)
        inputs = {
            "query": (shapes.q, spec.q_heads, spec.head_dim),
            "key": (shapes.kv, spec.kv_heads, spec.head_dim),
            "value": (shapes.kv, spec.kv_heads, spec.head_dim),
        }
        output = Result("output", inputs["query"], query.shape, query.dtype)
        keys = {"keys": shapes.keys} if spec.takes_keys else {}
        return self._begin(engine, inputs, shards, keys, (output,))

    def collect(self, execution: Execution) -> EngineDownload:
        """Start bringing the output ``[Sq, Nq, H]`` to the host; its LSE is NaN."""
        download = super().collect(execution)
        (output,) = download.arrays
        return replace(download, arrays=(output, np.full(output.shape[:2], np.nan, np.float32)))

    def describe(self) -> Mapping[str, str]:
        """The GPU, the library, the engines and what their proofs cost."""
        return {**self._runtime.describe(), "proofs": "; ".join(self._proofs.values())}
