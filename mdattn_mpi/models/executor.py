"""A transformer as an executor: what the batch loop begins, enqueues and collects."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from mdattn_mpi.backends import HostArray, StrategyBackend
from mdattn_mpi.costs import Costs
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.estimate import enough_ranks
from mdattn_mpi.models.attention import SharedAttention, StrategyWish
from mdattn_mpi.models.network import Network
from mdattn_mpi.models.outputs import Pool, outputs_of
from mdattn_mpi.models.proof import Proof, prove
from mdattn_mpi.models.sequence import ONE_DOCUMENT, TokenSequence, owners_of
from mdattn_mpi.problem import ModelPlan, ModelProblem, Span
from mdattn_mpi.text import counted, memory_size

if TYPE_CHECKING:
    import torch

    from mdattn_mpi.lockstep import Group
    from mdattn_mpi.models.size import ModelSize


class Arrays(NamedTuple):
    """Outputs on their way to the host; `end` is an event of the GPU, or None."""

    arrays: tuple[HostArray, ...]
    end: Any = None

    def wait(self) -> tuple[HostArray, ...]:
        """Return the arrays once they are there; any thread may call."""
        if self.end is not None:
            self.end.synchronize()
        return self.arrays


@dataclass
class Running:
    """An item between `begin` and `collect`."""

    plan: ModelPlan
    sequence: TokenSequence
    outputs: list[Any] = field(default_factory=list)


class Transformer:
    """A model that one group of ranks runs together, each on its own tokens.

    Parameters
    ----------
    backend
        Ours on this group; open.
    network
        The model, on the rank's device.
    group
        The ranks.
    size, costs
        How large it is, and what a rank has for it.
    give, pool, strategy
        Which outputs; how embeddings are pooled; how layers share their attention.

    """

    def __init__(
        self,
        backend: StrategyBackend,
        network: Network,
        group: Group,
        size: ModelSize,
        costs: Costs,
        *,
        give: Sequence[str],
        pool: Pool,
        strategy: StrategyWish,
    ) -> None:
        self.name = backend.name
        self.network = network
        self._backend, self._group = backend, group
        self._give, self._pool, self._strategy = give, pool, strategy
        self._size, self._costs = size, costs
        self._marks: deque[tuple[Any, Any]] = deque()  # on a GPU, before and after an item
        self._seconds = 0.0  # between those that are past
        self.proof: Proof | None = None

    def prove(self) -> None:
        """Collective. Refuse a model that ranks can't run together; see `proof`."""
        self.proof = prove(
            self.network, self._backend.device, self.name, self._group, self._strategy
        )
        self.proof.check()

    def owners(self, tokens: int) -> tuple[tuple[Span, ...], ...]:
        """Say which tokens each rank of the group holds."""
        return owners_of(tokens, self._group.size, self.network.causal)

    def plan(self, problem: ModelProblem) -> ModelPlan:
        """Choose how all layers share a sequence; refuse what has no position.

        Raises
        ------
        RejectedError
            Says how many tokens the model takes.

        """
        assert self.proof is not None
        ranks = self._group.size
        self._check_memory(problem)
        shared = self._shared(problem.tokens, self._strategy)
        layers = [shared.plan(layer) for layer in self.proof.layers]
        heaviest = max(layers, key=lambda plan: plan.problem.flops)
        why = (*heaviest.reasons, self._size.describe(problem, ranks, self._costs))
        return ModelPlan(problem, heaviest.strategy, ranks, self._size.folder.digest, why)

    def _check_memory(self, problem: ModelProblem) -> None:
        ranks, room = self._group.size, self._costs.memory
        if room and self._size.memory(problem, ranks, self._costs) > room:
            raise RejectedError(
                f"{problem.tokens} tokens don't fit {counted(ranks, 'rank')} of "
                f"{memory_size(room)}: " + self._size.describe(problem, ranks, self._costs),
                fix=self._enough(problem),
            )

    def _enough(self, problem: ModelProblem) -> str:
        """Say how many ranks would do."""
        enough = enough_ranks(
            lambda ranks: self._size.memory(problem, ranks, self._costs),
            problem.tokens,
            self._costs.memory,
        )
        if enough is None:
            return "use devices with more memory: no number of ranks is enough"
        return f"share it among at least {max(enough, self._group.size + 1)} ranks"

    def host_empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """An array for `begin`."""
        return np.empty(shape, dtype)

    def begin(self, plan: ModelPlan, *shards: HostArray) -> Running:
        """Take all ids of an item, and where its documents start, if more than one."""
        ids, *starts = (array.astype(np.int64) for array in shards)
        own = self.owners(plan.problem.tokens)[self._group.rank]
        return Running(plan, TokenSequence(ids, starts[0] if starts else ONE_DOCUMENT, own))

    def enqueue(self, running: Running) -> None:
        """Collective. Run the model, layer after layer.

        Raises
        ------
        DeviceError
            The GPU's memory doesn't hold it; says how many ranks would.

        """
        import torch

        try:
            with self._marked():
                running.outputs = self._run(running)
        except torch.OutOfMemoryError as error:
            ranks = counted(self._group.size, "rank")
            raise DeviceError(
                f"{running.plan.problem.tokens} tokens on {ranks}: {error}",
                fix=self._enough(running.plan.problem) + ", or leave such items out (--items)",
            ) from error

    @contextmanager
    def _marked(self) -> Iterator[None]:
        import torch

        if self.network.device.type == "cpu":
            yield
            return
        stream = torch.cuda.current_stream(self.network.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        yield
        after.record(stream)
        self._marks.append((before, after))

    def _run(self, running: Running) -> list[Any]:
        """Collective. Make the outputs in their order: tensors, or arrays of the host."""
        sequence, network = running.sequence, self.network
        segments = tuple(sequence.starts.tolist())
        shared = self._shared(len(sequence.ids), running.plan.strategy, segments)
        hidden = network.run(sequence, shared)
        found = outputs_of(network, hidden, sequence, self._group, self._give, self._pool)
        return [found[tensor.name] for tensor in running.plan.problem.outputs]

    def _shared(
        self, tokens: int, strategy: StrategyWish, segments: tuple[int, ...] = ()
    ) -> SharedAttention:
        owners = self.owners(tokens)
        reserved = self._size.activations(tokens, self._group.size)
        device = self._backend.device
        return SharedAttention(device, self.name, owners, strategy, segments, reserved)

    def collect(self, running: Running) -> Arrays:
        """Start bringing the outputs to the host."""
        arrays, end = [], None
        for each in running.outputs:
            if isinstance(each, np.ndarray):
                arrays.append(each)
            else:
                host, end = _to_host(each)
                arrays.append(host)
        running.outputs = []
        return Arrays(tuple(arrays), end)

    def describe(self) -> Mapping[str, str]:
        """The model, the device and the libraries, with versions."""
        import torch
        import transformers

        network = self.network
        return {
            "model": f"{network.name} in {network.dtype}, {memory_size(network.nbytes)} a rank",
            **self._backend.describe(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def timings(self) -> Mapping[str, float]:
        """Seconds of the GPU, all of the model's layers in ``compute``; a CPU's are the host's."""
        found = dict(self._backend.timings())
        attention = found.pop("compute", 0.0)
        while self._marks and self._marks[0][1].query():
            before, after = self._marks.popleft()
            self._seconds += before.elapsed_time(after) / 1e3
        if self.network.device.type != "cpu":
            others = found.get("exchange", 0.0) + found.get("merge", 0.0)
            found["compute"] = max(attention, self._seconds - others)
        return found

    def close(self) -> None:
        """Release the device."""
        self._backend.close()

    def abort(self) -> None:
        """Abort the device."""
        self._backend.abort()


def _to_host(tensor: torch.Tensor) -> tuple[HostArray, Any]:
    """Start bringing a 16-bit tensor to the host, which NumPy has no name for; with its end."""
    import torch

    dtype = np.dtype(ml_dtypes.bfloat16 if tensor.dtype == torch.bfloat16 else np.float16)
    bits = tensor.contiguous().view(torch.int16)
    if tensor.device.type == "cpu":
        return bits.numpy().view(dtype), None
    host = torch.empty(bits.shape, dtype=bits.dtype, pin_memory=True)
    host.copy_(bits, non_blocking=True)
    end = torch.cuda.Event()
    end.record(torch.cuda.current_stream(tensor.device))
    return host.numpy().view(dtype), end
