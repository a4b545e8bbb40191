"""A sequence of token ids: who holds which of them, and at which positions the model sees them.

Ids are few bytes: every rank has all of them, and knows what comes after its own last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.partition import contiguous, zigzag
from mdattn_mpi.problem import Span

if TYPE_CHECKING:
    import torch

Ids = NDArray[np.int64]
ONE_DOCUMENT: Ids = np.zeros(1, np.int64)  # where documents start, in what isn't packed


@dataclass(frozen=True)
class Numbering:
    """How a model numbers positions.

    From ``first`` on; a token that is ``padding`` isn't counted, and has that number as position.
    """

    first: int = 0
    padding: int | None = None


def numbering_of(model: torch.nn.Module) -> Numbering:
    """See how a model numbers positions: from 0 on, or as RoBERTa does, after the padding's."""
    for module in model.modules():
        padding = getattr(getattr(module, "position_embeddings", None), "padding_idx", None)
        if padding is not None:
            return Numbering(padding + 1, padding)
    return Numbering()


def owners_of(tokens: int, ranks: int, causal: bool) -> tuple[tuple[Span, ...], ...]:
    """Say which tokens each rank holds in all layers: alike much work, if most are causal."""
    return (zigzag if causal else contiguous)(tokens, ranks)


@dataclass(frozen=True)
class TokenSequence:
    """All ids of one item, and where its documents begin.

    ``ids`` ``[S]``; ``starts`` the first tokens of the documents, 0 among them, in order; ``own``
    the spans that this rank holds.
    """

    ids: Ids
    starts: Ids
    own: tuple[Span, ...]

    @property
    def documents(self) -> int:
        """How many documents are packed into it."""
        return len(self.starts)

    @cached_property
    def places(self) -> Ids:
        """``[own]``: where in the sequence the rank's tokens are."""
        runs = [np.arange(span.start, span.stop, dtype=np.int64) for span in self.own]
        return np.concatenate([np.empty(0, np.int64), *runs])

    def document_of(self, places: Ids) -> Ids:
        """Say of each place which document it is in."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def positions(self, numbering: Numbering) -> Ids:
        """``[own]``: at which positions the model sees the rank's tokens; anew in each document."""
        counted = np.ones(self.ids.shape, np.int64)
        if numbering.padding is not None:
            counted = (self.ids != numbering.padding).astype(np.int64)
        until = np.cumsum(counted)
        before = (until - counted)[self.starts]  # counted before each document
        found = until[self.places] - 1 - before[self.document_of(self.places)] + numbering.first
        if numbering.padding is not None:
            found[counted[self.places] == 0] = numbering.padding
        return found

    def targets(self) -> tuple[Ids, NDArray[np.bool_]]:
        """``[own]`` twice: the id that follows each of the rank's tokens, and whether one does."""
        following = self.places + 1
        inside = following < len(self.ids)
        inside[inside] &= ~np.isin(following[inside], self.starts)
        found = np.zeros(self.places.shape, np.int64)
        found[inside] = self.ids[following[inside]]
        return found, inside

    def runs(self) -> list[tuple[int, Span]]:
        """List the rank's rows by document: ``(document, rows)``, in the order of the rows."""
        found: list[tuple[int, Span]] = []
        documents = self.document_of(self.places)
        cuts = np.flatnonzero(np.diff(documents)) + 1
        for rows in np.split(np.arange(len(documents)), cuts):
            if len(rows):
                found.append((int(documents[rows[0]]), Span(int(rows[0]), int(rows[-1]) + 1)))
        return found


def edges(own: Sequence[Span]) -> list[int]:
    """List the places after the rank's spans: their predictors are the rank's."""
    return [span.stop for span in own if len(span)]
