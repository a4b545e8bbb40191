"""Start and end of all ranks together."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.board import board as current_board
from mdattn_mpi.lockstep.group import Group
from mdattn_mpi.lockstep.launcher import Launcher, launcher
from mdattn_mpi.lockstep.mpi import MPI, mpi_library

PATIENCE = 2.0  # seconds


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

    def __init__(
        self,
        comm: MPI.Intracomm,
        launched: Launcher,
        board: Board,
        deadline: float | None = None,
    ) -> None:
        super().__init__(comm, board, deadline)
        self.hostname = os.uname().nodename
        mine = (
            os.environ.get("SLURMD_NODENAME") or self.hostname,
            " ".join(map(str, sorted(os.sched_getaffinity(0)))),
            int.from_bytes(os.urandom(8), "little") >> 1,
        )
        self.nodes, allowed, numbers = zip(*self.allgather(mine), strict=True)
        self.node = self.nodes[self.rank]
        self.local_rank, self.local_size = launched.local_rank, launched.local_size
        # Not MPI's split by shared memory: under srun Open MPI finds every rank alone there.
        if self.local_rank < 0:
            self.local_rank = self.nodes[: self.rank].count(self.nodes[self.rank])
        if self.local_size < 0:
            self.local_size = self.nodes.count(self.nodes[self.rank])
        self.cores = share_of_cores(allowed, self.nodes, self.rank)
        self.job = int(numbers[0])
        board.identify(job=self.job, rank=self.rank, size=self.size, local_size=self.local_size)

    @classmethod
    def of_program(cls, comm: MPI.Intracomm, what: str, deadline: float) -> World:
        """Collective. Make a world of another MPI program's communicator, over a copy of it.

        All its ranks call `what`, and wait for each other `deadline` seconds at most, here and in
        every agreement.

        Raises
        ------
        InterruptedJobError
            Ranks never came: on those that did, naming the others.

        """
        from mdattn_mpi.lockstep.arrival import duplicate  # which no job needs

        return cls(duplicate(comm, what, deadline), launcher(), current_board(), deadline)

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
        # Where one rank alone has failed the others are elsewhere: it must not wait for them.
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
            time.sleep(PATIENCE)  # our exit ends rank 0 too, which prints the error
        raise _mismatch(launched)
    return World(MPI.COMM_WORLD, launched, board)


def share_of_cores(allowed: Sequence[str], nodes: Sequence[str], rank: int) -> int:
    """Count the cores that are a rank's own.

    A rank that its launcher bound to some cores has them to itself; others divide theirs equally
    among all ranks that may run on the same ones. `allowed` has the cores of each rank, with blanks
    between, and `nodes` its node.
    """
    sharing = list(zip(nodes, allowed, strict=True)).count((nodes[rank], allowed[rank]))
    return max(1, len(allowed[rank].split()) // sharing)


def leave(board: Board) -> None:
    """Collective. Finalize MPI, if that is still to be done."""
    if MPI.Is_initialized() and not MPI.Is_finalized():
        board.enter("end")
        with board.waiting():
            MPI.Finalize()
    board.end()


def _suspect_the_launcher(board: Board, launched: Launcher) -> None:
    """Store what to report if MPI ends the process: it may, under the launcher of another MPI.

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
