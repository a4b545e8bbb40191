"""Agreement: a barrier that is also a check that all ranks are about to do the same.

One all-reduce of a few 64-bit words carries everything: two that show whether all ranks hold the
same digest, one for a pending error, two for items that are refused, one for a wish to stop, one
for the least of a count, and in groups of up to `SLOTS` ranks one a rank for a number of its own,
such as the checksum of what it wrote. In larger groups such numbers are gathered once all have
agreed, so that the all-reduce doesn't grow. Only when something is wrong do the ranks exchange
sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import itemgetter
from struct import Struct
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from mdattn_mpi.errors import ItemError, name_ranks
from mdattn_mpi.lockstep.mpi import MPI

MASK = (1 << 64) - 1
ODD = 0x9E3779B97F4A7C15  # multiplication by an odd number loses nothing modulo 2⁶⁴
# Digest and complement; ranks of an error, a refused, an unwritten item; wish to stop; a count.
HEAD_WORDS = 7
SLOTS = 256  # 2 KiB with the head: more is reduced no faster than gathered (docs/reliability.md)
HEAD = Struct(f"={HEAD_WORDS}Q")
WORD = Struct("=Q")


class Step(NamedTuple):
    """What a rank is about to do.

    ``facts_digest`` stands for everything else that ranks must share; ``describe`` gives it by name
    and is called only when ranks differ.
    """

    item_index: int
    phase: str
    facts_digest: int
    describe: Callable[[], dict[str, Any]] = dict


class Agreement(NamedTuple):
    """What all ranks know after an agreement.

    ``words`` has one a rank where words were given, on the ranks that they are for, else nothing.
    ``refused`` says what is wrong with the item ahead, ``unwritten`` with the one behind, on the
    lowest rank that found something. ``least`` is the least count that any rank gave.
    """

    stop: bool
    words: tuple[int, ...] = ()
    refused: ItemError | None = None
    unwritten: ItemError | None = None
    least: int = 0


class Ballot:
    """Collective. The words of the agreements over `comm`, used again and again.

    ``size`` counts the 64-bit words of one all-reduce: at most `HEAD_WORDS` + `SLOTS`.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        slots = comm.size if comm.size <= SLOTS else 0
        self.size = HEAD_WORDS + slots
        words = Struct(f"={self.size}Q")
        self._sent, received = bytearray(words.size), bytearray(words.size)
        self._number = comm.size - comm.rank  # the greatest is the lowest rank's
        self._slot = HEAD.size + comm.rank * WORD.size if slots else None  # this rank's own
        self._unpack = partial(words.unpack, received)
        self._reduce, self.free = _reduction(comm, self._sent, received)

    def cast(
        self,
        step: Step,
        failed: bool,
        refuses: bool,
        unwritten: bool,
        stop: bool,
        count: int,
        word: int,
    ) -> tuple[int, ...]:
        """Collective. Give this rank's words; return the greatest that any rank gave, of each."""
        # After a millisecond of other work none of this is in the processor's caches, and what it
        # costs is how much of Python and MPI it touches: hence no calls but these.
        number = self._number
        digest = (step.facts_digest ^ _phase_word(step.phase) ^ (step.item_index + 1) * ODD) & MASK
        HEAD.pack_into(
            self._sent, 0, digest, digest ^ MASK, number if failed else 0,
            number if refuses else 0, number if unwritten else 0, stop, MASK - count,
        )  # fmt: skip
        if self._slot is not None:
            WORD.pack_into(self._sent, self._slot, word)
        self._reduce()
        return self._unpack()

    def words(self, cast: tuple[int, ...], word: int, reader: int | None) -> tuple[int, ...]:
        """Collective, once all have agreed that they give a word. Everybody's, by rank.

        They were `cast` where there are slots. Else they are gathered on rank `reader`, and on the
        others there are none; None stands for all.
        """
        if self._slot is not None:
            return cast[HEAD_WORDS:] if reader in (None, self._comm.rank) else ()
        own, everybodys = np.array([word], np.uint64), np.empty(self._comm.size, np.uint64)
        if reader is None:
            self._comm.Allgather(own, everybodys)
        else:
            self._comm.Gather(own, everybodys, reader)
        return tuple(everybodys.tolist()) if reader in (None, self._comm.rank) else ()


@cache
def _phase_word(phase: str) -> int:
    """Return the part of a digest that stands for a phase; the same in every process."""
    return crc32(phase.encode()) << 32


def _reduction(
    comm: MPI.Intracomm, sent: bytearray, received: bytearray
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Collective. What reduces all words to the greatest, and what frees it again.

    Prepared once, where the library has MPI 4.
    """
    count = len(sent) // WORD.size
    messages = [sent, count, MPI.UINT64_T], [received, count, MPI.UINT64_T]
    try:
        request = comm.Allreduce_init(*messages, MPI.MAX)
    except NotImplementedError:
        return partial(comm.Allreduce, *messages, MPI.MAX), lambda: None
    start, wait = request.Start, request.Wait

    def reduce() -> None:
        start()
        wait()

    return reduce, request.Free


def differences(facts: Sequence[dict[str, Any]], ranks: Sequence[int]) -> str:
    """Say which of `ranks` hold which value of what they differ in; `facts` has one a rank."""
    missing = "nothing"
    found = []
    for name in dict.fromkeys(name for each in facts for name in each):
        holders: dict[str, list[int]] = {}
        for rank, each in sorted(zip(ranks, facts, strict=True), key=itemgetter(0)):
            value = repr(each[name]) if name in each else missing
            holders.setdefault(value, []).append(rank)
        if len(holders) > 1:
            by_size = sorted(holders.items(), key=lambda holder: -len(holder[1]))
            values = ", ".join(
                f"{value} on {name_ranks(sorted(those))}" for value, those in by_size
            )
            found.append(f"{name} ({values})")
    if not found:
        return "ranks differ in something that has no name here: their digests are not the same"
    return f"ranks differ in {'; '.join(found)}"
