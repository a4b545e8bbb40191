"""What is given of a sequence: hidden states, embeddings pooled over it, log-probabilities.

What concerns the whole sequence is summed in float64, rank after rank in their order, so that the
same ranks give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.models.sequence import Ids, TokenSequence, edges

if TYPE_CHECKING:
    import torch

    from mdattn_mpi.lockstep import Group

Pool = Literal["mean", "last", "first"]
Floats = NDArray[np.float64]

LOGIT_BYTES = 1 << 29  # of logits in float32 at a time


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
