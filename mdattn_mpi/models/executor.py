"""A transformer as an executor: what the batch loop begins, enqueues and collects."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import ml_dtypes
import numpy as np

from mdattn_mpi.backends import HostArray, StrategyBackend
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.models.attention import SharedAttention, StrategyWish
from mdattn_mpi.models.network import Network
from mdattn_mpi.models.outputs import Pool, embeddings, logprobs
from mdattn_mpi.models.proof import Proof, prove
from mdattn_mpi.models.sequence import ONE_DOCUMENT, TokenSequence, owners_of
from mdattn_mpi.problem import ModelPlan, ModelProblem, Span, TensorSpec

if TYPE_CHECKING:
    import torch

    from mdattn_mpi.lockstep import Group

HIDDEN, EMBEDDING, LOGPROBS = GIVEN = ("last_hidden_state", "embedding", "logprobs")
TOTALS = ("logprobs_sum", "perplexity")  # one number each, beside logprobs


def given_tensors(
    give: Sequence[str], tokens: int, documents: int, width: int, dtype: str
) -> tuple[TensorSpec, ...]:
    """Name what comes out of a sequence, in the order in which the executor gives it.

    ``last_hidden_state`` ``[S, D]`` in the model's dtype; ``embedding`` ``[D]`` float32, one a
    document where some are packed; ``logprobs`` ``[S]`` float32, with ``logprobs_sum`` and
    ``perplexity``, ``[1]`` in float64.
    """
    pooled = (documents, width) if documents > 1 else (width,)
    every = {
        HIDDEN: (TensorSpec(HIDDEN, (tokens, width), dtype),),
        EMBEDDING: (TensorSpec(EMBEDDING, pooled, "float32", None),),
        LOGPROBS: (
            TensorSpec(LOGPROBS, (tokens,), "float32"),
            *(TensorSpec(name, (1,), "float64", None) for name in TOTALS),
        ),
    }
    return tuple(tensor for name in GIVEN if name in give for tensor in every[name])


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
    give, pool, strategy
        Which outputs; how embeddings are pooled; how layers share their attention.
    digest
        Of the model's folder.

    """

    def __init__(
        self,
        backend: StrategyBackend,
        network: Network,
        group: Group,
        *,
        give: Sequence[str],
        pool: Pool,
        strategy: StrategyWish,
        digest: str,
    ) -> None:
        self.name = backend.name
        self.network = network
        self._backend, self._group = backend, group
        self._give, self._pool, self._strategy = give, pool, strategy
        self._digest = digest
        self._seconds = 0.0
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
        shared = self._shared(problem.tokens, self._strategy)
        layers = [shared.plan(layer) for layer in self.proof.layers]
        heaviest = max(layers, key=lambda plan: plan.problem.flops)
        why = (*heaviest.reasons, *self.proof.describe())
        return ModelPlan(problem, heaviest.strategy, self._group.size, self._digest, why)

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

        began = time.perf_counter()
        try:
            running.outputs = self._run(running)
        except torch.OutOfMemoryError as error:
            ranks = self._group.size
            raise DeviceError(
                f"{running.sequence.ids.size} tokens on {ranks} ranks: {error}",
                fix=f"start {2 * ranks} ranks, or leave such items out (--items)",
            ) from error
        self._seconds += time.perf_counter() - began

    def _run(self, running: Running) -> list[Any]:
        """Collective. Make the outputs in their order: tensors, or arrays of the host."""
        sequence, network = running.sequence, self.network
        shared = self._shared(len(sequence.ids), running.plan.strategy)
        hidden = network.run(sequence, shared)
        found: list[Any] = []
        if HIDDEN in self._give:
            found.append(hidden)
        if EMBEDDING in self._give:
            pooled = embeddings(self._group, hidden, sequence, self._pool)
            found.append(pooled.reshape(_tensor(running, EMBEDDING).shape))
        if LOGPROBS in self._give:
            assert network.head is not None
            own, totals = logprobs(self._group, hidden, sequence, network.head, network.vocabulary)
            found += [own, totals[:1], totals[1:]]
        return found

    def _shared(self, tokens: int, strategy: StrategyWish) -> SharedAttention:
        return SharedAttention(self._backend.device, self.name, self.owners(tokens), strategy)

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
            "model": f"{network.name} in {network.dtype}, {network.nbytes / 2**30:.2f} GiB a rank",
            **self._backend.describe(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def timings(self) -> Mapping[str, float]:
        """Ask the device, which knows of attention alone; ``model`` is the host's time in all."""
        return {**self._backend.timings(), "model": self._seconds}

    def close(self) -> None:
        """Release the device."""
        self._backend.close()

    def abort(self) -> None:
        """Abort the device."""
        self._backend.abort()


def _tensor(running: Running, name: str) -> TensorSpec:
    return next(tensor for tensor in running.plan.problem.outputs if tensor.name == name)


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
    end.record()
    return host.numpy().view(dtype), end


def check_give(give: str) -> tuple[str, ...]:
    """Take names of outputs apart.

    Raises
    ------
    RejectedError
        One that isn't known, or none.

    """
    names = tuple(name.strip() for name in give.split(",") if name.strip())
    unknown = [name for name in names if name not in GIVEN]
    if unknown or not names:
        raise RejectedError(
            f"--give {give}: there is no {', '.join(unknown) or 'output named'}",
            fix=f"use some of {','.join(GIVEN)}",
        )
    return names


POOLS = get_args(Pool)
