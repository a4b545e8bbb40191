"""Ranks that work together, and what they say to each other.

Everything on the wire is a buffer or JSON bytes; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from mdattn_mpi.errors import DisagreementError, ItemError, MdattnError
from mdattn_mpi.lockstep.agreement import HEAD_WORDS, MASK, Agreement, Ballot, Step, differences
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.board import board as current_board
from mdattn_mpi.lockstep.mpi import MPI
from mdattn_mpi.problem import digest_of

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.arrival import Arrivals

PIECE = 1 << 30  # bytes a message: MPI counts in 32 bits with a sign

T = TypeVar("T")

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Group:
    """Ranks that work together.

    Parameters
    ----------
    comm
        The communicator of the group. Devices use it; the group itself talks over a copy.
    board
        Where this rank says that it waits; the process's own board by default.
    deadline
        Seconds to wait for the other ranks in `agree`, `barrier` and `allgather`, where no watchdog
        ends a wait; None to wait as long as it takes.

    Attributes
    ----------
    world_rank
        Which rank of the job this is: what errors name.
    local_rank, local_size
        Which of how many ranks of the job on this node, whatever group they work in.
    cores
        How many of the node's cores are this rank's own.
    node
        The node, by the name that the launcher has for it.

    """

    def __init__(
        self, comm: MPI.Intracomm, board: Board | None = None, deadline: float | None = None
    ) -> None:
        self.comm = comm
        self.control = comm.Dup()
        self.deadline = deadline
        self.board = board or current_board()
        self.rank: int = comm.rank
        self.world_rank = self.rank
        self.size: int = comm.size
        self.local_rank, self.local_size, self.cores = 0, 1, 1
        self.node = ""
        self._ballot = Ballot(self.control)
        self._arrivals: Arrivals | None = None

    def agree(
        self,
        step: Step,
        *,
        error: MdattnError | None = None,
        refused: ItemError | None = None,
        unwritten: ItemError | None = None,
        word: int | None = None,
        reader: int | None = None,
        stop: bool = False,
        count: int = 0,
    ) -> Agreement:
        """Collective. Make sure that all ranks are about to do the same; a barrier that checks.

        Parameters
        ----------
        step
            What this rank is about to do.
        error
            What went wrong on this rank since the last agreement.
        refused
            What is wrong with the item that this step begins, and with nothing else; it doesn't
            end the step.
        unwritten
            The same of the item behind, which is not to be declared done.
        word
            A number below 2⁶⁴ for the others; on all ranks or none, as the step says.
        reader
            The rank of this group that the words are for; None stands for all.
        stop
            Whether this rank wants to stop.
        count
            A number below 2⁶⁴, of which all learn the least.

        Raises
        ------
        MdattnError
            The error of the lowest rank that brought one; the same on all ranks.
        DisagreementError
            Ranks differ in what they are about to do; the same on all ranks.
        InterruptedJobError
            Ranks didn't come within the group's deadline; on those that did.

        """
        self._arrive(step.phase)
        cast = self._ballot.cast(
            step,
            error is not None,
            refused is not None,
            unwritten is not None,
            stop,
            count,
            word or 0,
        )
        high, low, failed, refusing, lacking, stops, most = cast[:HEAD_WORDS]
        if failed:
            raise self._error_of(self.size - failed, error) from error
        if high ^ low != MASK:
            raise self._disagreement(step)
        words = () if word is None else self._ballot.words(cast, word, reader)
        if refusing:
            refused = self._item_error_of(self.size - refusing, refused)
        if lacking:
            unwritten = self._item_error_of(self.size - lacking, unwritten)
        return Agreement(stops != 0, words, refused, unwritten, MASK - most)

    def _arrive(self, phase: str) -> None:
        """Collective. Say that this rank waits; where there is a deadline, wait for all with it."""
        self.board.wait()
        if self.deadline is not None:
            self._await_all(phase, self.deadline)

    @contextmanager
    def _gathering(self, what: str) -> Iterator[None]:
        """Collective. Say that this rank waits in the block; with a deadline, wait for all first.

        It is no agreement: who waits for whom is told by the phase that the ranks are in.
        """
        if self.deadline is not None:
            self._await_all(what, self.deadline)
        with self.board.waiting():
            yield

    def _await_all(self, what: str, deadline: float) -> None:
        from mdattn_mpi.lockstep.arrival import Arrivals

        if self._arrivals is None:
            self._arrivals = Arrivals(self.control)
        self._arrivals.wait(what, deadline)

    def _error_of(self, root: int, own: MdattnError | None) -> MdattnError:
        """Collective. The error of rank `root`, on all ranks."""
        if own and own.rank is None:
            own.rank = self.world_rank
        data = own.to_json() if own and self.rank == root else None
        error = MdattnError.from_json(self.bcast_bytes(data, root))
        error.agreed = True
        return error

    def _item_error_of(self, root: int, own: ItemError | None) -> ItemError:
        error = self._error_of(root, own)
        assert isinstance(error, ItemError)
        return error

    def _disagreement(self, step: Step) -> DisagreementError:
        """Collective. Who differs in what, the same on all ranks."""
        facts = {"item index": step.item_index, "phase": step.phase, **step.describe()}
        ranks, found = zip(*self.allgather((self.world_rank, facts)), strict=True)
        error = DisagreementError(
            differences(found, ranks),
            fix="start all ranks with the same command, input files, options and software",
        )
        error.agreed = True
        return error

    def barrier(self) -> None:
        """Collective. Wait until all ranks are here."""
        self._arrive("barrier")
        self.control.Barrier()

    def bcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """Collective. Give all ranks the root's `data`, of any length."""
        received = self.bcast_large(data, root)
        return received if isinstance(received, bytes) else bytes(received)

    def bcast_large(self, data: bytes | memoryview | None, root: int = 0) -> bytes | memoryview:
        """Collective. Give all ranks the root's `data`, of any length; one copy a rank, no more."""
        length = np.array([len(data or b"")], np.int64)
        self.control.Bcast(length, root)
        # Not a bytearray: that writes zeros first, which takes longer than receiving.
        received = data if self.rank == root else np.empty(int(length[0]), np.uint8).data
        assert received is not None, "the root broadcasts nothing"
        view = memoryview(received)
        for start in range(0, len(view), PIECE):
            self.control.Bcast([view[start : start + PIECE], MPI.BYTE], root)
        return received

    def allgather(self, own: Any) -> list[Any]:
        """Collective. Give every rank what all have, as JSON says it, in rank order."""
        data, lengths = json.dumps(own, default=str).encode(), np.empty(self.size, np.int64)
        with self._gathering("allgather"):
            self.control.Allgather(np.array([len(data)], np.int64), lengths)
            gathered = np.empty(lengths.sum(), np.uint8)
            self.control.Allgatherv([data, MPI.BYTE], [gathered, (lengths, None), MPI.BYTE])
        return [json.loads(bytes(each)) for each in np.split(gathered, lengths.cumsum()[:-1])]

    def sum_in_order(self, own: Floats) -> Floats:
        """Collective. Sum arrays of one shape, rank after rank: always the same last bit."""
        gathered = np.empty((self.size, *own.shape))
        with self._gathering("sum"):
            self.control.Allgather(np.ascontiguousarray(own), gathered)
        total: Floats = gathered[0]
        for part in gathered[1:]:
            total += part
        return total

    def node_size(self) -> int:
        """Collective. Ranks of a node, where the group is several nodes, in order; see there."""
        return node_size_of(self.allgather(self.node))

    def split(self, color: int, key: int = 0) -> Group:
        """Collective. Make groups of ranks with the same `color`, ordered by `key`, then rank."""
        self.board.identify(group=color)
        group = Group(cast(MPI.Intracomm, self.comm.Split(color, key)), self.board, self.deadline)
        group.world_rank = self.world_rank
        group.local_rank, group.local_size = self.local_rank, self.local_size
        group.cores, group.node = self.cores, self.node
        return group

    def free(self) -> None:
        """Collective. Give back the communicators of a group that `split` made."""
        self._ballot.free()
        if self._arrivals is not None:
            self._arrivals.free()
        self.control.Free()
        self.comm.Free()


def node_size_of(nodes: Sequence[str]) -> int:
    """Ranks of a node, where those of each node follow each other and all nodes have as many.

    `nodes` names the node of every rank. 1 where that isn't so, or all ranks are on one.
    """
    size = nodes.count(nodes[0])
    blocks = [set(nodes[start : start + size]) for start in range(0, len(nodes), size)]
    even = len(nodes) % size == 0 and all(len(block) == 1 for block in blocks)
    return size if even and 1 < len(blocks) == len(set(nodes)) else 1


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
        What each of them does; it may fail on some. What is collective in it (in the group, or in
        smaller ones) must have been agreed on before: else those that fail before it leave the
        others waiting in it.
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
        error = MdattnError.wrap(failure, rank=group.world_rank)
    group.agree(Step(-1, phase, digest_of(found), lambda: found), error=error)
    return value  # type: ignore[return-value]


def gather_together(group: Group, phase: str, action: Callable[[], T]) -> list[T]:
    """Collective. Do something as in `together`; return what it gave each rank, as JSON has it."""
    return group.allgather(together(group, phase, action))
