"""A transformer as a kind of work: token ids in, hidden states, embeddings or log-probs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from mdattn_mpi.backends import HostArray, StrategyBackend, backend_name, open_backend
from mdattn_mpi.costs import typical_costs
from mdattn_mpi.dataset import AnyItem, scan_file
from mdattn_mpi.dataset.tokens import TokenFile, open_tokens
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.lockstep import Group, World, gather_together, together
from mdattn_mpi.models.executor import Transformer
from mdattn_mpi.models.folder import ModelFolder, open_folder
from mdattn_mpi.models.load import load
from mdattn_mpi.models.network import Network
from mdattn_mpi.models.outputs import LOGPROBS, check_give
from mdattn_mpi.models.sequence import owners_of
from mdattn_mpi.models.size import ModelSize
from mdattn_mpi.planning.schedule import Measure, make_schedule
from mdattn_mpi.problem import DTYPES, AnyPlan, ModelPlan, Span, TensorSpec
from mdattn_mpi.runner.finite import first_nonfinite
from mdattn_mpi.runner.groups import memory_of_a_rank, open_groups
from mdattn_mpi.runner.job import Job, say, scan_once
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.work import Shard, Task
from mdattn_mpi.text import memory_size


class TransformerWork:
    """A model over every item of a file of token ids."""

    def __init__(
        self, spec: JobSpec, folder: ModelFolder, network: Network, dataset: TokenFile
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.network = network
        self.dataset = dataset

    def task(self, item: AnyItem, plan: AnyPlan, rank: int) -> Task:
        """Say that the rank reads all ids, and writes what is given of its own tokens."""
        assert isinstance(plan, ModelPlan)
        tokens = plan.problem.tokens
        owners = owners_of(tokens, plan.ranks, self.network.causal)
        reads = [self._all_of(item, "input_ids")]
        if self.dataset.documents(item) > 1:
            reads.append(self._all_of(item, "segments"))
        writes = tuple(
            Shard(tensor, owners[rank], here=tensor.token_dim is not None or rank == 0)
            for tensor in plan.problem.outputs
        )
        return Task(item, plan, owners, tuple(reads), writes)

    def _all_of(self, item: AnyItem, tensor: str) -> Shard:
        data = self.dataset.tensor(item, tensor)
        return Shard(TensorSpec(tensor, data.shape, str(data.dtype)), (Span(0, data.shape[0]),))

    def check(self, task: Task, shards: Sequence[HostArray]) -> None:
        """Refuse ids that the model has no embedding of, and documents that aren't in order."""
        if fault := self.network.fault_of(shards[0]):
            what, fix = fault
            raise ItemError(what, fix=fix, file=self.spec.data, item=task.item.name)
        self.dataset.starts(task.item)

    def check_outputs(self, task: Task, arrays: Sequence[HostArray]) -> None:
        """Refuse what isn't finite, unless it may pass."""
        if self.spec.nonfinite == "pass":
            return
        for shard, array in zip(task.writes, arrays, strict=True):
            at = first_nonfinite(array)
            if at is not None:
                raise ItemError(
                    f"{shard.tensor.name} holds {array.reshape(-1)[at]}: numbers on the way are "
                    f"too large for {self.network.dtype}",
                    fix="use --dtype bf16, which holds as large numbers as float32"
                    if self.network.dtype == "float16"
                    else "take it as it is with --nonfinite pass",
                    file=self.spec.data,
                    item=task.item.name,
                )

    def options(self) -> dict[str, str]:
        """Items, model, and what of it is given how."""
        spec = self.spec
        return {
            "items": spec.items,
            "strategy": spec.strategy,
            "model": self.folder.digest,
            "dtype": spec.dtype,
            "give": spec.give,
            "pool": spec.pool,
            "nonfinite": spec.nonfinite,
        }


def check_options(spec: JobSpec) -> None:
    """Refuse options of other kinds of work.

    Raises
    ------
    RejectedError
        Says which option to leave out.

    """
    others = {
        "--lse": spec.lse,
        "--engine": spec.engine,
        "--bind": spec.bind,
        f"-b {spec.backend}": spec.backend == "tensorrt",
        f"--layout {spec.layout}": spec.layout != "auto",
    }
    wrong = next((name for name, given in others.items() if given), None)
    if wrong:
        raise RejectedError(f"{wrong} with --model", fix=f"leave {wrong} out")


def open_transformer(spec: JobSpec, world: World) -> Job:
    """Collective. Open model and file; prove the model on its ranks; plan every item."""
    folder = together(
        world, "model", lambda: open_folder(spec.model), lambda found: {"model": found.digest}
    )
    name = backend_name(spec.backend, world)
    room = min(gather_together(world, "memory", lambda: memory_of_a_rank(name, world)))
    costs = typical_costs(name, room, preparing=0.0)
    network = together(world, "load", lambda: _load(spec, folder, name, world, room))
    give = together(world, "arguments", lambda: check_give(spec.give, network.causal))
    size = ModelSize(folder, DTYPES[spec.dtype], network.causal, LOGPROBS in give)
    dataset = _open_tokens(spec, world, network, size, give)
    work = TransformerWork(spec, folder, network, dataset)
    items = dataset.items
    schedule = together(
        world,
        "schedule",
        lambda: make_schedule(
            [item.problem for item in items],
            world.nodes,
            spec.group_size,
            costs,
            Measure(size.seconds, size.memory),
        ),
        lambda schedule: {"group sizes": schedule.signature},
    )

    def open_one(group: Group) -> Transformer:
        backend = open_backend(
            name, group, threads=spec.threads, transfer=spec.transfer, kernel=spec.kernel
        )
        opened = Transformer(
            cast(StrategyBackend, backend),
            network,
            group,
            size,
            costs,
            give=give,
            pool=spec.pool,
            strategy=spec.strategy,
        )
        opened.prove()
        return opened

    groups = open_groups(world, schedule, open_one)
    for group in groups:
        transformer = cast(Transformer, group.executor)
        assert transformer.proof is not None
        say(spec, world, "\n".join(f"mdattn: {line}" for line in transformer.proof.describe()))
        mine = [items[item] for item in schedule.queues[group.queue].items]
        group.plan(world, mine, transformer.plan, spec.data)
    return Job(spec, world, work, dataset, items, schedule, groups)


def _open_tokens(
    spec: JobSpec, world: World, network: Network, size: ModelSize, give: Sequence[str]
) -> TokenFile:
    """Collective. Open the file of token ids; say what is to be made of every item."""
    problem = size.problem_of(network, give, spec.beyond_positions)
    catalog = scan_once(
        world, "dataset", lambda: scan_file(spec.data, spec.allow, select=spec.items)
    )
    return together(
        world,
        "dataset",
        lambda: open_tokens(
            spec.data,
            problem,
            select=spec.items,
            allow=spec.allow,
            ignore=spec.ignore,
            catalog=catalog,
        ),
        lambda file: {"dataset": file.path, "digest": file.fingerprint, "bytes": file.size},
    )


def _load(spec: JobSpec, folder: ModelFolder, backend: str, world: World, room: int) -> Network:
    """Load the model where the rank computes, if its weights alone fit there."""
    nbytes = 2 * folder.parameters
    if nbytes > room:
        raise RejectedError(
            f"its weights take {memory_size(nbytes)} of every rank, which has "
            f"{memory_size(room)} for them",
            fix="use devices with more memory, or fewer ranks a node: each holds all weights",
            file=spec.model,
        )
    device = "cpu" if backend == "cpu" else f"cuda:{world.local_rank}"
    model = load(
        folder,
        DTYPES[spec.dtype],
        device,
        head=LOGPROBS in spec.give,
        threads=spec.threads or world.cores,
    )
    return Network(model)
