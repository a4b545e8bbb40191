"""How much travels in an agreement, whatever the number of ranks; and where words end up."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from mdattn_mpi.lockstep import Step
from mdattn_mpi.lockstep.agreement import HEAD_WORDS, SLOTS, Ballot

STEP = Step(3, "begin", 77)


class Comm:
    """The communicator of one of `size` ranks, whose others give what this one does.

    Of a word, they give their own rank.
    """

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank
        self.reduced: list[int] = []  # words of every all-reduce
        self.gathered: list[int] = []  # words of every gather

    def Allreduce_init(self, sent: Any, received: Any, operation: Any) -> Any:
        comm = self

        class Request:
            def Start(self) -> None:
                assert sent[1] == received[1]
                assert 8 * sent[1] == len(sent[0]) == len(received[0])
                comm.reduced.append(sent[1])
                received[0][:] = sent[0]

            def Wait(self) -> None:
                pass

            def Free(self) -> None:
                pass

        return Request()

    def Gather(self, own: Any, everybodys: Any, root: int) -> None:
        self.gathered.append(len(own))
        if self.rank == root:
            everybodys[:] = np.arange(self.size)
            everybodys[self.rank] = own[0]


def cast_one(ballot: Ballot, word: int) -> tuple[int, ...]:
    return ballot.cast(STEP, False, False, False, False, 0, word)


@pytest.mark.parametrize("size", [1, 2, 4, 64, 256, 257, 1024, 100_000])
def test_the_words_of_an_all_reduce_stop_growing(size: int) -> None:
    comm = Comm(size, 0)
    ballot = Ballot(cast(Any, comm))
    word = (1 << 64) - 2
    words = ballot.words(cast_one(ballot, word), word, 0)
    expected = HEAD_WORDS + (size if size <= SLOTS else 0)
    assert ballot.size == expected <= HEAD_WORDS + SLOTS == 263
    assert comm.reduced == [expected]
    assert comm.gathered == ([] if size <= SLOTS else [1])
    assert len(words) == size
    assert words[0] == word


@pytest.mark.parametrize("size", [3, SLOTS, SLOTS + 1, 1024])
def test_only_the_reader_gets_words(size: int) -> None:
    for rank in (0, 1, size - 1):
        ballot = Ballot(cast(Any, Comm(size, rank)))
        words = ballot.words(cast_one(ballot, 5), 5, 1)
        assert len(words) == (size if rank == 1 else 0)
