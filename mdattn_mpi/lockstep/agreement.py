"""Agreement: a barrier that is also a check that all ranks are about to do the same.

One all-reduce of a few 64-bit words carries everything: two that tell whether all ranks hold the
same digest, one for a pending error, one for an item that is refused, one for a wish to stop, and
one a rank for the checksum of what it wrote. Only when something is wrong do the ranks use words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mpi4py import MPI

from mdattn_mpi.errors import DisagreementError, ItemError, MdattnError
from mdattn_mpi.problem import digest_of

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import Group

T = TypeVar("T")

MASK = (1 << 64) - 1
ODD = 0x9E3779B97F4A7C15  # multiplication by an odd number loses nothing modulo 2⁶⁴
HEAD_WORDS = 5  # digest, its complement, an error's rank, that of a refused item, wish to stop
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

    ``checksums`` has one a rank where checksums were given, else nothing. ``refused`` says what is
    wrong with the item ahead, on the lowest rank that found something.
    """

    stop: bool
    checksums: tuple[int, ...] = ()
    refused: ItemError | None = None


class Ballot:
    """The words of a group's agreements, used again and again."""

    def __init__(self, group: Group) -> None:
        self._group = group
        words = Struct(f"={HEAD_WORDS + group.size}Q")
        self.sent, received = bytearray(words.size), bytearray(words.size)
        self.own = HEAD.size + group.rank * WORD.size  # where this rank's checksum goes
        self.unpack = partial(words.unpack, received)
        self.reduce, self.free = _reduction(group.control, self.sent, received)

    def told(self, root: int, own: MdattnError | None) -> MdattnError:
        """Collective. The error of rank `root`, on all ranks."""
        data = own.to_json() if own and self._group.rank == root else None
        error = MdattnError.from_json(self._group.bcast_bytes(data, root))
        error.rank = root if error.rank is None else error.rank
        error.agreed = True
        return error

    def raise_disagreement(self, step: Step) -> None:
        """Collect what the ranks are about to do, and raise who differs in what, on all ranks."""
        facts = {"item index": step.item_index, "phase": step.phase, **step.describe()}
        gathered = self._group.gather_bytes(json.dumps(facts, default=str).encode())
        data = None
        if gathered is not None:
            data = differences([json.loads(part) for part in gathered]).encode()
        error = DisagreementError(
            self._group.bcast_bytes(data).decode(),
            fix="start all ranks with the same command, input files, options and software",
        )
        error.agreed = True
        raise error


def _reduction(
    comm: MPI.Intracomm, sent: bytearray, received: bytearray
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Collective. What reduces all words to the greatest, and what gives it back.

    It is prepared once where there is MPI 4.
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


def differences(facts: Sequence[dict[str, Any]]) -> str:
    """Say which ranks hold which value of what they differ in; `facts` is in rank order."""
    missing = "nothing"
    found = []
    for name in dict.fromkeys(name for each in facts for name in each):
        holders: dict[str, list[int]] = {}
        for rank, each in enumerate(facts):
            value = repr(each[name]) if name in each else missing
            holders.setdefault(value, []).append(rank)
        if len(holders) > 1:
            by_size = sorted(holders.items(), key=lambda holder: -len(holder[1]))
            values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_size)
            found.append(f"{name} ({values})")
    if not found:
        return "ranks differ in something that has no name here: their digests are not the same"
    return f"ranks differ in {'; '.join(found)}"


def _ranks(ranks: Sequence[int]) -> str:
    """For example ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


def together(
    group: Group,
    phase: str,
    action: Callable[[], T],
    facts: Callable[[T], dict[str, Any]] = lambda _: {},
) -> T:
    """Collective. Do something on every rank; go on together, or raise the same error together.

    Parameters
    ----------
    group
        The ranks.
    phase
        What they do, in a word.
    action
        What each of them does; it may fail on some.
    facts
        Of what `action` returned, all that must be the same on every rank.

    Raises
    ------
    MdattnError
        Of the lowest rank that failed; the same on all ranks.
    DisagreementError
        The facts differ; the same on all ranks.

    """
    group.board.enter(phase)
    error: MdattnError | None = None
    found: dict[str, Any] = {}
    value: T | None = None
    try:
        value = action()
        found = facts(value)
    except Exception as failure:
        error = MdattnError.wrap(failure, rank=group.rank)
    group.agree(Step(-1, phase, digest_of(found), lambda: found), error=error)
    return value  # type: ignore[return-value]
