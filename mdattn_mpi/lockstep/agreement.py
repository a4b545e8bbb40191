"""Agreement: a barrier that is also a check that all ranks are about to do the same.

One all-reduce of a few 64-bit words carries everything: two that tell whether all ranks hold the
same digest, one for a pending error, one for an item that is refused, one for a wish to stop, and
one a rank for the checksum of what it wrote. Only when something is wrong do the ranks use words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from zlib import crc32

import numpy as np
from mpi4py import MPI

from mdattn_mpi.errors import DisagreementError, ItemError, MdattnError
from mdattn_mpi.problem import digest_of

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import Group

T = TypeVar("T")

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15  # multiplication by an odd number loses nothing modulo 2⁶⁴
_HIGH, _LOW, _ERROR, _REFUSED, _STOP, _CHECKSUMS = range(6)


class Step(NamedTuple):
    """What a rank is about to do.

    ``facts_digest`` stands for everything else that ranks must share; ``describe`` gives it by name
    and is called only when ranks differ.
    """

    item_index: int
    phase: str
    facts_digest: int
    describe: Callable[[], dict[str, Any]] = dict

    @property
    def digest(self) -> int:
        """64 bits of item, phase and facts; cheap, not cryptographic."""
        phase = crc32(self.phase.encode()) << 32
        return (self.facts_digest ^ phase ^ (self.item_index + 1) * _ODD) & _MASK


class Agreement(NamedTuple):
    """What all ranks know after an agreement.

    ``checksums`` has one a rank where checksums were given, else nothing. ``refused`` says what is
    wrong with the item ahead, on the lowest rank that found something.
    """

    stop: bool
    checksums: tuple[int, ...] = ()
    refused: ItemError | None = None


class Ballot:
    """The buffers of a group's agreements, used again and again."""

    def __init__(self, group: Group) -> None:
        self._group = group
        size = _CHECKSUMS + group.size
        sent, received = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
        self._sent, self._received = sent.data, received.data
        # A microsecond counts here: nothing is looked up or converted twice.
        messages = [sent, size, MPI.UINT64_T], [received, size, MPI.UINT64_T]
        self._allreduce = partial(group.control.Allreduce, *messages, MPI.MAX)
        self._mine = _CHECKSUMS + group.rank

    def agree(
        self,
        step: Step,
        error: MdattnError | None,
        refused: ItemError | None,
        checksum: int | None,
        stop: bool,
    ) -> Agreement:
        """See `Group.agree`."""
        group, sent, received = self._group, self._sent, self._received
        digest = step.digest
        sent[_HIGH] = digest
        sent[_LOW] = digest ^ _MASK
        # The greatest is the lowest rank; 0 is none.
        sent[_ERROR] = group.size - group.rank if error else 0
        sent[_REFUSED] = group.size - group.rank if refused else 0
        sent[_STOP] = stop
        sent[self._mine] = checksum or 0
        group.board.wait()
        self._allreduce()
        if received[_ERROR]:
            root = group.size - received[_ERROR]
            raise self._told(root, error) from (error if group.rank == root else None)
        if received[_HIGH] != received[_LOW] ^ _MASK:
            self._raise_disagreement(step)
        if received[_REFUSED]:
            told = self._told(group.size - received[_REFUSED], refused)
            assert isinstance(told, ItemError)
            refused = told
        checksums = () if checksum is None else tuple(received[_CHECKSUMS:].tolist())
        return Agreement(received[_STOP] != 0, checksums, refused)

    def _told(self, root: int, own: MdattnError | None) -> MdattnError:
        """Collective. The error of rank `root`, on all ranks."""
        data = own.to_json() if own and self._group.rank == root else None
        error = MdattnError.from_json(self._group.bcast_bytes(data, root))
        error.rank = root if error.rank is None else error.rank
        error.agreed = True
        return error

    def _raise_disagreement(self, step: Step) -> None:
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
