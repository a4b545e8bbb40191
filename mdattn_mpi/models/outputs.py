"""What is given of a sequence: hidden states, embeddings pooled over it, log-probabilities.

What concerns the whole sequence is summed in float64, rank after rank in their order, so that the
same ranks give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models.sequence import Ids, TokenSequence, edges
from mdattn_mpi.problem import TensorSpec

if TYPE_CHECKING:
    import torch

    from mdattn_mpi.lockstep import Group
    from mdattn_mpi.models.network import Network

Pool = Literal["mean", "last", "first"]
Floats = NDArray[np.float64]

LOGIT_BYTES = 1 << 29  # of logits in float32 at a time

HIDDEN, EMBEDDING, LOGPROBS = GIVEN = ("last_hidden_state", "embedding", "logprobs")
SUM, PERPLEXITY = "logprobs_sum", "perplexity"  # one number each, beside logprobs


def given_tensors(
    give: Sequence[str], tokens: int, documents: int, width: int, dtype: str
) -> tuple[TensorSpec, ...]:
    """Name what comes out of a sequence, in the order in which `outputs_of` gives it.

    ``last_hidden_state`` ``[S, D]`` in the model's dtype; ``embedding`` ``[D]`` float32, one a
    document where more than one are packed; ``logprobs`` ``[S]`` float32, with ``logprobs_sum`` and
    ``perplexity``, ``[1]`` in float64.
    """
    pooled = (documents, width) if documents > 1 else (width,)
    every = {
        HIDDEN: (TensorSpec(HIDDEN, (tokens, width), dtype),),
        EMBEDDING: (TensorSpec(EMBEDDING, pooled, "float32", None),),
        LOGPROBS: (
            TensorSpec(LOGPROBS, (tokens,), "float32"),
            *(TensorSpec(name, (1,), "float64", None) for name in (SUM, PERPLEXITY)),
        ),
    }
    return tuple(tensor for name in GIVEN if name in give for tensor in every[name])


def outputs_of(
    network: Network,
    hidden: torch.Tensor,
    sequence: TokenSequence,
    group: Group,
    give: Sequence[str],
    pool: Pool,
) -> dict[str, Any]:
    """Collective. Make of the rank's hidden states what is to be given, by name.

    A tensor for the hidden states, NumPy arrays for all that is small.
    """
    found: dict[str, Any] = {}
    if HIDDEN in give:
        found[HIDDEN] = hidden
    if EMBEDDING in give:
        pooled = embeddings(group, hidden, sequence, pool)
        found[EMBEDDING] = pooled if sequence.documents > 1 else pooled[0]
    if LOGPROBS in give:
        assert network.head is not None
        own, totals = logprobs(group, hidden, sequence, network.head, network.vocabulary)
        found |= {LOGPROBS: own, SUM: totals[:1], PERPLEXITY: totals[1:]}
    return found


def check_give(give: str, causal: bool) -> tuple[str, ...]:
    """Take names of outputs apart.

    Raises
    ------
    RejectedError
        One that isn't known, or none; log-probabilities of a model that sees later tokens.

    """
    names = tuple(name.strip() for name in give.split(",") if name.strip())
    unknown = [name for name in names if name not in GIVEN]
    if unknown or not names:
        raise RejectedError(
            f"--give {give}: there is no {', '.join(unknown) or 'output named'}",
            fix=f"use some of {','.join(GIVEN)}",
        )
    if LOGPROBS in names and not causal:
        raise RejectedError(
            "--give logprobs of a model whose tokens see those after them",
            fix="use a causal language model, or leave logprobs out",
        )
    return names


def embeddings(
    group: Group, hidden: torch.Tensor, sequence: TokenSequence, pool: Pool
) -> NDArray[np.float32]:
    """Collective. Pool ``[own, D]`` over each document: ``[documents, D]``, on every rank."""
    import torch

    width = (sequence.documents, hidden.shape[1])
    sums = torch.zeros(width, dtype=torch.float64, device=hidden.device)
    stops = np.append(sequence.starts[1:], len(sequence.ids))
    for document, rows in sequence.runs():
        own = hidden[rows.slice]
        if pool == "mean":
            sums[document] += own.sum(0, dtype=torch.float64)
            continue
        wanted = sequence.starts[document] if pool == "first" else stops[document] - 1
        at = np.flatnonzero(sequence.places[rows.slice] == wanted)
        if len(at):
            sums[document] = own[int(at[0])].double()
    total = group.sum_in_order(sums.cpu().numpy())
    if pool == "mean":
        total /= (stops - sequence.starts)[:, None]
    return total.astype(np.float32)


def logprobs(
    group: Group,
    hidden: torch.Tensor,
    sequence: TokenSequence,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
) -> tuple[NDArray[np.float32], Floats]:
    """Collective. Say how probable each of the rank's tokens was, given those before it.

    Returns
    -------
    tuple
        ``[own]`` float32, the natural logarithm, 0 for the first token of a document; and ``[2]``,
        alike on all ranks: the sum over the sequence, and the perplexity.

    """
    targets, inside = sequence.targets()
    following = _of_following(hidden, targets, logits_of, vocabulary)
    following[~inside] = 0.0
    stops = np.cumsum([len(span) for span in sequence.own if len(span)], dtype=np.int64)
    own_edges = dict(zip(edges(sequence.own), following[stops - 1].tolist(), strict=True))
    everyones: dict[int, float] = {}
    for known in group.allgather(own_edges):
        everyones.update({int(place): value for place, value in known.items()})
    found = np.zeros(following.shape)
    found[1:] = following[:-1]
    for row in np.append(0, stops[:-1]) if len(stops) else ():
        found[row] = everyones.get(int(sequence.places[row]), 0.0)
    (total,) = group.sum_in_order(np.array([found.sum()]))
    counted = len(sequence.ids) - sequence.documents
    return found.astype(np.float32), np.array([total, np.exp(-total / max(1, counted))])


def _of_following(
    hidden: torch.Tensor,
    targets: Ids,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
) -> Floats:
    """``[own]``: the log-probability of each target, from the hidden state of the token before."""
    import torch

    at_a_time = max(1, LOGIT_BYTES // (4 * vocabulary))
    wanted = torch.from_numpy(targets).to(hidden.device)
    found: list[Any] = [torch.zeros(0, dtype=torch.float64, device=hidden.device)]
    for start in range(0, len(targets), at_a_time):
        rows, some = (each[start : start + at_a_time] for each in (hidden, wanted))
        logits = logits_of(rows).float()
        chosen = logits.gather(1, some[:, None])[:, 0]
        found.append((chosen - logits.logsumexp(1)).double())
    values: Floats = torch.cat(found).cpu().numpy()
    return values
