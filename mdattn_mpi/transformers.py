"""Whole transformers over sequences that many ranks hold together, for programs of one's own.

::

    from mdattn_mpi.transformers import parallelize

    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    together = parallelize(model, MPI.COMM_WORLD)
    out = together(ids)                  # all ids, on every rank
    out.last_hidden_state, out.places    # of this rank's tokens, and which these are
    out.embedding()                      # of the whole sequence, on every rank

``mdattn run --model`` does it for the items of a file.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.library.session import Session, check_comm, session_of
from mdattn_mpi.models import check_installed
from mdattn_mpi.models.attention import NAME, SharedAttention, StrategyWish, register
from mdattn_mpi.models.network import Network
from mdattn_mpi.models.outputs import Pool, embeddings, logprobs
from mdattn_mpi.models.proof import prove
from mdattn_mpi.models.sequence import ONE_DOCUMENT, Ids, TokenSequence, owners_of
from mdattn_mpi.models.size import Shape

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from mdattn_mpi.backends import AnyDevice
    from mdattn_mpi.problem import KernelName

__all__ = ["ParallelModel", "States", "parallelize"]


def parallelize(
    model: Any,
    comm: Any,
    *,
    strategy: StrategyWish = "auto",
    kernel: Literal["auto"] | KernelName = "auto",
    deadline: float | None = None,
) -> ParallelModel:
    """Collective. Let the ranks of `comm` run a model together, each on its own tokens.

    The model is proved first: a short random sequence on all ranks against the whole on one, and
    against attention inside each rank only. From then on its attention is ours: called by itself it
    refuses.

    Parameters
    ----------
    model
        A model of Transformers, in bfloat16 or float16, the same on every rank: on the CPU, or on
        the GPU of the rank's local rank. With a language model's head, log-probabilities can be
        had.
    comm
        An mpi4py intracommunicator. It is duplicated.
    strategy
        ``ring``, ``allgather``, ``ulysses``, or ``auto``, which picks one of them by length.
    kernel
        What attends on GPUs: ``cudnn``, ``flash`` or ``auto``, as in `mdattn_mpi.attention`.
    deadline
        Seconds to wait for ranks that don't come; by default the environment variable
        ``MDATTN_DEADLINE``, else 600.

    Raises
    ------
    RejectedError
        A model that ranks can't run together, or not in this dtype. The same error on all ranks,
        unless it is `comm` that can't be.
    DisagreementError
        Ranks hold different models. The same error on all ranks.
    InterruptedJobError
        Some ranks didn't come before the deadline; on the others, naming them.

    """
    from mdattn_mpi.lockstep.arrival import call_deadline

    check_comm(comm)
    session = session_of(comm, call_deadline(deadline))
    network = _agreed(session, "parallelize", lambda: _network(model), _facts)
    made = ParallelModel(session, network, strategy, kernel)
    with session.left_on_error(), made._device() as device:
        proof = prove(network, device, made.backend, session.world, strategy)
        proof.check()
    made.proof = proof.describe()
    return made


class ParallelModel:
    """A model that all ranks of a communicator run together; `parallelize` makes it.

    Attributes
    ----------
    proof
        What was proved of it, and what couldn't be, in sentences.

    """

    def __init__(
        self, session: Session, network: Network, strategy: StrategyWish, kernel: str
    ) -> None:
        self._session, self._network = session, network
        self._strategy, self._kernel = strategy, kernel
        self.backend = "cpu" if network.device.type == "cpu" else "cuda"
        self.proof: tuple[str, ...] = ()

    def places(self, tokens: int) -> Ids:
        """Say which tokens of a sequence this rank holds: ``[own]``, in its order."""
        return TokenSequence(np.zeros(tokens, np.int64), ONE_DOCUMENT, self._owners(tokens)).places

    def __call__(self, input_ids: Any) -> States:
        """Collective. Run the model over a sequence.

        Parameters
        ----------
        input_ids
            ``[S]``, all of it on every rank: a tensor of PyTorch or a NumPy array of integers.

        Raises
        ------
        RejectedError
            Ids beyond the vocabulary, or more than the model has positions for. The same error on
            all ranks.
        DisagreementError
            Ranks bring different ids. The same error on all ranks.
        InterruptedJobError
            Some ranks didn't come before the deadline; on the others, naming them.

        """
        ids = _agreed(self._session, "model", lambda: self._ids(input_ids), _facts_of_ids)
        owners = owners_of(len(ids), self._session.world.size, self._network.causal)
        sequence = TokenSequence(ids, ONE_DOCUMENT, owners[self._session.world.rank])
        with self._session.left_on_error(), self._device() as device:
            shape = Shape.of(self._network.config)
            reserved = shape.activations(-(-len(ids) // len(owners)))
            shared = SharedAttention(
                device, self.backend, owners, self._strategy, reserved=reserved
            )
            hidden = self._network.run(sequence, shared)
        return States(self._session, self._network, sequence, hidden)

    def _device(self) -> AbstractContextManager[AnyDevice]:
        return self._session.device(self.backend, self._kernel)

    def _owners(self, tokens: int) -> tuple[Any, ...]:
        world = self._session.world
        return owners_of(tokens, world.size, self._network.causal)[world.rank]

    def _ids(self, given: Any) -> Ids:
        array = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            raise RejectedError(
                f"input_ids are {array.dtype}{list(array.shape)}",
                fix="give the integers of one sequence, [S], S at least 1, on every rank",
            )
        self._network.check_length(len(array), beyond=True)
        if fault := self._network.fault_of(array):
            raise RejectedError(fault[0], fix=fault[1])
        return array.astype(np.int64)


class States:
    """What came out of a sequence on this rank.

    Attributes
    ----------
    last_hidden_state
        ``[own, D]`` in the model's dtype, of the rank's own tokens.
    places
        ``[own]``: which tokens of the sequence these are.

    """

    def __init__(
        self, session: Session, network: Network, sequence: TokenSequence, hidden: torch.Tensor
    ) -> None:
        self._session, self._network, self._sequence = session, network, sequence
        self.last_hidden_state = hidden
        self.places = sequence.places

    def embedding(self, pool: Pool = "mean") -> NDArray[np.float32]:
        """Collective. Pool over the whole sequence: ``[D]``, on every rank; summed in float64."""
        pooled = embeddings(self._session.world, self.last_hidden_state, self._sequence, pool)
        return pooled.reshape(-1)

    def logprobs(self) -> tuple[NDArray[np.float32], float, float]:
        """Collective. Say how probable each of the rank's tokens was, given those before it.

        Returns
        -------
        tuple
            ``[own]``, natural logarithms, 0 for the first token of all; their sum over the whole
            sequence; the perplexity.

        Raises
        ------
        RejectedError
            The model has no head, or tokens see those after them.

        """
        network = self._network
        if network.head is None or not network.causal:
            raise RejectedError(
                f"{network.name} gives no log-probabilities",
                fix="parallelize a causal language model with its head (AutoModelForCausalLM)",
            )
        own, (total, perplexity) = logprobs(
            self._session.world,
            self.last_hidden_state,
            self._sequence,
            network.head,
            network.vocabulary,
        )
        return own, float(total), float(perplexity)


def _network(model: Any) -> Network:
    check_installed()
    register()
    dtype = str(getattr(model, "dtype", "")).rpartition(".")[2]
    if dtype not in ("bfloat16", "float16"):
        raise RejectedError(
            f"the model is in {dtype or 'no dtype'}", fix="give it in 16 bits: model.bfloat16()"
        )
    model.set_attn_implementation(NAME)
    return Network(model.eval())


def _facts(network: Network) -> dict[str, Any]:
    """What ranks must have in common: names, shapes and some numbers of all weights."""
    digest = hashlib.sha256()
    for name, weight in network.backbone.named_parameters():
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 64)].float().tolist()
        digest.update(f"{name} {tuple(weight.shape)} {some}".encode())
    return {"model": network.name, "dtype": network.dtype, "weights": digest.hexdigest()}


def _facts_of_ids(ids: Ids) -> dict[str, Any]:
    return {"tokens": len(ids), "ids": hashlib.sha256(ids.tobytes()).hexdigest()}


def _agreed(session: Session, phase: str, action: Any, facts: Any) -> Any:
    """Collective. Do something on every rank, with the same facts, or fail on all together."""
    from mdattn_mpi.problem import digest_of

    session.check_open()
    error, value, found = None, None, {}
    try:
        value = action()
        found = facts(value)
    except Exception as wrong:  # all ranks must hear of it
        error = MdattnError.wrap(wrong, rank=session.world.rank)
    with session.left_if_alone():
        session.agree(phase, lambda: found, digest_of(found), error=error)
    return value
