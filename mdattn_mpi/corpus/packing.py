"""Short texts one after the other in one sequence, in the order in which they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.corpus.tokenizer import Tokens


class NewItem(NamedTuple):
    """What becomes an item: its texts in their order, one where nothing is packed."""

    name: str
    texts: list[Tokens]

    @property
    def starts(self) -> NDArray[np.int64]:
        """``[texts]``: the first token of each."""
        lengths = [len(text.ids) for text in self.texts]
        return np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64)


def alone(texts: Iterable[Tokens]) -> Iterator[NewItem]:
    """Give every text a sequence of its own."""
    for text in texts:
        yield NewItem(text.source.name, [text])


def pack(texts: Iterable[Tokens], tokens: int) -> Iterator[NewItem]:
    """Fill sequences of at most so many `tokens`, without cutting a text.

    A longer text gets a sequence of its own. The order of the texts is kept: the n-th document of
    the file is the n-th text.
    """
    number, held, size = 0, list[Tokens](), 0
    for text in texts:
        if held and size + len(text.ids) > tokens:
            yield NewItem(f"pack{number}", held)
            number, held, size = number + 1, [], 0
        held.append(text)
        size += len(text.ids)
    if held:
        yield NewItem(f"pack{number}", held)
