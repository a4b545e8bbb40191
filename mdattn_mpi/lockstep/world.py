"""Start and end of the ranks, the groups they form, and what they say to each other.

Everything on the wire is a buffer or JSON bytes; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import Any, cast
from zlib import crc32

import mpi4py
import numpy as np

# The world starts and ends when `start` and `World.end` say so, and not by the import.
mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
from mpi4py import MPI  # noqa: E402

from mdattn_mpi.errors import ItemError, MdattnError, RejectedError  # noqa: E402
from mdattn_mpi.lockstep.agreement import (  # noqa: E402
    HEAD,
    HEAD_WORDS,
    MASK,
    ODD,
    WORD,
    Agreement,
    Ballot,
    Step,
)
from mdattn_mpi.lockstep.board import Board  # noqa: E402
from mdattn_mpi.lockstep.board import board as current_board  # noqa: E402
from mdattn_mpi.lockstep.launcher import Launcher, launcher  # noqa: E402

PATIENCE = 2.0  # seconds
PIECE = 1 << 30  # bytes a message: MPI counts in 32 bits with a sign


class Group:
    """Ranks that work together.

    Parameters
    ----------
    comm
        The communicator of the group. Devices use it; the group itself talks over a copy.
    board
        Where waits are told; the process's own board by default.

    Attributes
    ----------
    local_rank, local_size
        Which of how many ranks of the job on this node, whatever group they work in.
    cores
        How many of the node's cores are this rank's own.

    """

    def __init__(self, comm: MPI.Intracomm, board: Board | None = None) -> None:
        self.comm = comm
        self.control = comm.Dup()
        self.board = board or current_board()
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.local_rank, self.local_size, self.cores = 0, 1, 1
        self._ballot = Ballot(self)

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return self.size

    def agree(
        self,
        step: Step,
        *,
        error: MdattnError | None = None,
        refused: ItemError | None = None,
        checksum: int | None = None,
        stop: bool = False,
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
        checksum
            32 bits for all the others; on all ranks or none.
        stop
            Whether this rank wants to stop.

        Raises
        ------
        MdattnError
            The error of the lowest rank that brought one; the same on all ranks.
        DisagreementError
            Ranks differ in what they are about to do; the same on all ranks.

        """
        # After a millisecond of other work none of this is in the processor's caches, and what it
        # costs is how much of Python and MPI it touches: hence no calls but these.
        ballot, number = self._ballot, self.size - self.rank  # the greatest is the lowest rank's
        phase = _phase_number(step.phase)
        digest = (step.facts_digest ^ phase ^ (step.item_index + 1) * ODD) & MASK
        HEAD.pack_into(
            ballot.sent, 0, digest, digest ^ MASK,
            number if error else 0, number if refused else 0, stop,
        )  # fmt: skip
        WORD.pack_into(ballot.sent, ballot.own, checksum or 0)
        self.board.wait()
        ballot.reduce()
        words = ballot.unpack()
        high, low, failed, refusing, stops = words[:HEAD_WORDS]
        if failed:
            root = self.size - failed
            raise ballot.told(root, error) from (error if self.rank == root else None)
        if high ^ low != MASK:
            ballot.raise_disagreement(step)
        if refusing:
            told = ballot.told(self.size - refusing, refused)
            assert isinstance(told, ItemError)
            refused = told
        return Agreement(stops != 0, () if checksum is None else words[HEAD_WORDS:], refused)

    def barrier(self) -> None:
        """Collective. Wait until all ranks are here."""
        self.board.wait()
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

    def gather_bytes(self, data: bytes) -> list[bytes] | None:
        """Collective. Give rank 0 everybody's `data`, in rank order; None elsewhere."""
        lengths = np.empty(self.size, np.int64)
        self.control.Allgather(np.array([len(data)], np.int64), lengths)
        if self.rank:
            for start in range(0, len(data), PIECE):
                self.control.Send([memoryview(data)[start : start + PIECE], MPI.BYTE], 0)
            return None
        gathered = [data]
        for rank in range(1, self.size):
            received = memoryview(bytearray(int(lengths[rank])))
            for start in range(0, len(received), PIECE):
                self.control.Recv([received[start : start + PIECE], MPI.BYTE], rank)
            gathered.append(bytes(received))
        return gathered

    def allgather(self, own: Any) -> list[Any]:
        """Collective. Give every rank what all have, as JSON says it, in rank order."""
        gathered = self.gather_bytes(json.dumps(own).encode())
        every = json.dumps([json.loads(each) for each in gathered]).encode() if gathered else None
        found: list[Any] = json.loads(self.bcast_bytes(every))
        return found

    def split(self, color: int, key: int = 0) -> Group:
        """Collective. Make groups of ranks with the same `color`, ordered by `key`, then rank."""
        self.board.identify(group=color)
        group = Group(cast(MPI.Intracomm, self.comm.Split(color, key)), self.board)
        group.local_rank, group.local_size = self.local_rank, self.local_size
        group.cores = self.cores
        return group

    def free(self) -> None:
        """Collective. Give back the communicators of a group that `split` made."""
        self._ballot.free()
        self.control.Free()
        self.comm.Free()


class World(Group):
    """All ranks of the job. As a context manager it ends unless this rank alone has failed.

    Attributes
    ----------
    job
        A number that all ranks share and no other run has.
    hostname
        The host's name.
    nodes
        The node of every rank, by the name that the launcher has for it.

    """

    def __init__(self, comm: MPI.Intracomm, launched: Launcher, board: Board) -> None:
        super().__init__(comm, board)
        self.hostname = os.uname().nodename
        self.nodes = tuple(self.allgather(os.environ.get("SLURMD_NODENAME") or self.hostname))
        self.local_rank, self.local_size = launched.local_rank, launched.local_size
        # Not MPI's split by shared memory: under srun Open MPI finds every rank alone there.
        if self.local_rank < 0:
            self.local_rank = self.nodes[: self.rank].count(self.nodes[self.rank])
        if self.local_size < 0:
            self.local_size = self.nodes.count(self.nodes[self.rank])
        allowed = sorted(os.sched_getaffinity(0))
        everyone = self.allgather(" ".join(map(str, allowed)))
        self.cores = share_of_cores(everyone, self.nodes, self.rank)
        self.job = int.from_bytes(self.bcast_bytes(secrets.token_bytes(8)), "little")
        board.identify(job=self.job, rank=self.rank, size=self.size)

    def end(self) -> None:
        """Collective. Leave the world in order. Safe to call twice."""
        leave(self.board)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Where one rank alone has failed the others are elsewhere: nothing may wait for them.
        if error is None or getattr(error, "agreed", False):
            self.end()


def start() -> World:
    """Collective. Initialize MPI and find out who is here.

    Raises
    ------
    RejectedError
        The launcher started several processes, and each of them is alone in its MPI world.

    """
    board, launched = current_board(), launcher()
    board.identify(rank=launched.rank, size=launched.size)
    board.enter("start")
    if not MPI.Is_initialized():
        _suspect_the_launcher(board, launched)
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    board.started()
    if launched.size > 1 and MPI.COMM_WORLD.size == 1:
        leave(board)
        if launched.rank > 0:
            time.sleep(PATIENCE)  # rank 0 speaks for all, before the launcher ends it for our exit
        raise _mismatch(launched)
    return World(MPI.COMM_WORLD, launched, board)


@cache
def _phase_number(phase: str) -> int:
    """Return the part of a digest that stands for a phase; the same in every process."""
    return crc32(phase.encode()) << 32


def share_of_cores(allowed: Sequence[str], nodes: Sequence[str], rank: int) -> int:
    """Count the cores that are a rank's own.

    A rank that its launcher bound to some cores has them to itself; others divide theirs equally
    among all ranks that may run on the same ones.

    Parameters
    ----------
    allowed
        The cores that each rank may use, with blanks between.
    nodes
        Each rank's node.
    rank
        Whose cores.

    """
    rivals = list(zip(nodes, allowed, strict=True)).count((nodes[rank], allowed[rank]))
    return max(1, len(allowed[rank].split()) // rivals)


def leave(board: Board) -> None:
    """Collective. Finalize MPI, if that is still to be done."""
    if MPI.Is_initialized() and not MPI.Is_finalized():
        board.enter("end")
        with board.waiting():
            MPI.Finalize()
    board.end()


def mpi_library() -> str:
    """Name and version of the MPI library; may be asked before it is initialized."""
    name = MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0 ")
    return " ".join(name.replace("Version:", "").split())


def threads_may_call() -> bool:
    """Whether several threads may call MPI at once."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def _suspect_the_launcher(board: Board, launched: Launcher) -> None:
    """Leave word ahead: a library is likely to end the process in another one's launcher.

    It may also work: there are builds of MPICH that understand Open MPI's launcher.
    """
    library = mpi_library()
    if launched.speaks == "Open MPI" and "Open MPI" not in library:
        board.suspect(
            f"got no MPI: it was started by the mpirun of Open MPI, but mpi4py uses {library} "
            "(start with the mpirun that belongs to it)",
            RejectedError.exit_code,
        )


def _mismatch(launched: Launcher) -> RejectedError:
    library = mpi_library()
    error = RejectedError(
        f"{launched.name} ({launched.speaks}) started {launched.size} processes, but each is alone "
        f"in a world of 1: mpi4py uses {library}, which doesn't understand this launcher",
        fix=f"start with the mpirun that belongs to {library}; under Slurm try srun --mpi=pmix "
        "(`srun --mpi=list` shows what there is), or rebuild mpi4py with the site's MPI",
    )
    error.agreed = True  # every process finds the same
    return error
