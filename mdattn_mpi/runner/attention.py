"""Attention as a kind of work: shards of query, key and value in, of the output and LSE out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from mdattn_mpi.backends import Backend, HostArray, backend_name, open_backend
from mdattn_mpi.costs import PREPARING, typical_costs
from mdattn_mpi.dataset import TENSORS, AnyItem, Dataset, Item, open_dataset, scan_file
from mdattn_mpi.lockstep import Group, World, gather_together, together
from mdattn_mpi.partition import partition_of
from mdattn_mpi.planning.schedule import make_schedule
from mdattn_mpi.problem import AnyPlan, Plan, TensorSpec
from mdattn_mpi.runner.finite import check_finite, check_output, is_finite
from mdattn_mpi.runner.groups import JobGroup, memory_of_a_rank, open_groups
from mdattn_mpi.runner.job import Job, scan_once
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.work import Shard, Task


class Attention:
    """Attention over every item of a dataset."""

    def __init__(self, spec: JobSpec, dataset: Dataset) -> None:
        self.spec = spec
        self.dataset = dataset

    def task(self, item: AnyItem, plan: AnyPlan, rank: int) -> Task:
        """Say which tokens of query, key and value the rank reads, and which rows it writes."""
        assert isinstance(plan, Plan)
        owners, problem = partition_of(plan), plan.problem
        query, kv = owners.query[rank], owners.kv[rank]
        kv_rows = (problem.kv_tokens, problem.kv_heads)
        shapes = (
            (problem.q_tokens, problem.q_heads, problem.head_dim),
            (*kv_rows, problem.head_dim),
            (*kv_rows, problem.v_head_dim),
        )
        reads = tuple(
            Shard(TensorSpec(name, shape, problem.dtype), spans)
            for name, shape, spans in zip(TENSORS, shapes, (query, kv, kv), strict=True)
        )
        if problem.sinks:  # every rank reads all of them
            sinks = TensorSpec("sinks", (problem.q_heads,), "float32", None)
            reads += (Shard(sinks, ()),)
        writes = tuple(Shard(tensor, query) for tensor in problem.outputs(self.spec.lse))
        return Task(item, plan, owners.query, reads, writes)

    def check(self, task: Task, shards: Sequence[HostArray]) -> None:
        """Refuse NaN and infinity, unless they were asked for."""
        if self.spec.nonfinite == "refuse":
            spans = [shard.spans for shard in task.reads]
            check_finite(shards, spans, self.dataset.path, task.item.name)

    def check_outputs(self, task: Task, arrays: Sequence[HostArray]) -> None:
        """Refuse an output that isn't finite, unless its input wasn't either and may pass."""
        assert isinstance(task.item, Item)
        assert isinstance(task.plan, Plan)
        item, lse = task.item, arrays[1] if len(arrays) > 1 else None
        check_output(
            item,
            task.writes[0].spans,
            arrays[0],
            lse,
            backend=task.plan.backend,
            may_be_nonfinite=lambda: (
                self.spec.nonfinite == "pass" and not is_finite(self.dataset, item)
            ),
        )

    def options(self) -> dict[str, str]:
        """All that decides which bytes come out, but for backend and ranks, which jobs add."""
        spec = self.spec
        return {
            "strategy": spec.strategy,
            "kernel": spec.kernel,
            "transfer": spec.transfer,  # `auto` chooses its strategy by it
            "engine": _digest_of_engine(spec),
            "items": spec.items,
            "lse": str(spec.lse).lower(),
            "layout": spec.layout,
            "ignore": ",".join(sorted(set(spec.ignore))),
        }


def open_attention(spec: JobSpec, world: World) -> Job:
    """Collective. Open dataset and backends; plan every item, or refuse before any work."""

    def dataset_facts(dataset: Dataset) -> dict[str, Any]:
        return {"dataset": dataset.path, "digest": dataset.fingerprint, "bytes": dataset.size}

    catalog = scan_once(
        world, "dataset", lambda: scan_file(spec.data, spec.allow, select=spec.items)
    )
    dataset = together(
        world,
        "dataset",
        lambda: open_dataset(
            spec.data,
            select=spec.items,
            layout=spec.layout,
            allow=spec.allow,
            ignore=spec.ignore,
            catalog=catalog,
        ),
        dataset_facts,
    )
    name = backend_name(spec.backend, world)
    memory = gather_together(world, "schedule", lambda: memory_of_a_rank(name, world))
    ready = gather_together(world, "kernels", lambda: _needs_no_preparing(name, spec.kernel))
    costs = typical_costs(name, min(memory), preparing=0.0 if all(ready) else PREPARING)
    problems = [item.problem for item in dataset.items]
    schedule = together(
        world,
        "schedule",
        lambda: make_schedule(problems, world.nodes, spec.group_size, costs),
        lambda schedule: {"group sizes": schedule.signature},
    )

    def open_one(group: Group) -> Backend:
        return open_backend(
            name,
            group,
            threads=spec.threads,
            transfer=spec.transfer,
            kernel=spec.kernel,
            engine=spec.engine,
        )

    groups = open_groups(world, schedule, open_one)
    for group in groups:
        items = [dataset.items[item] for item in schedule.queues[group.queue].items]
        plan_attention(spec, world, group, items)
    return Job(spec, world, Attention(spec, dataset), dataset, dataset.items, schedule, groups)


def _needs_no_preparing(backend: str, kernel: str) -> bool:
    """Whether no length of this rank's calls needs preparing."""
    if backend != "cuda":
        return False
    from mdattn_mpi.devices.cuda.choice import needs_no_preparing

    return needs_no_preparing(kernel)


def _digest_of_engine(spec: JobSpec) -> str:
    if not spec.engine:
        return ""
    from mdattn_mpi.trt.store import sha256_of

    return sha256_of(Path(spec.engine).read_bytes())


def plan_attention(spec: JobSpec, world: World, group: JobGroup, items: Sequence[Item]) -> None:
    """Collective. Let the group's backend prepare for all items at once, and plan each."""
    backend = cast(Backend, group.executor)
    problems = [item.problem for item in items] if group.complete else []
    together(world, "prepare", lambda: backend.prepare(problems, spec.strategy))
    group.plan(world, items, lambda p: backend.plan(p, spec.strategy, lse=spec.lse), spec.data)
