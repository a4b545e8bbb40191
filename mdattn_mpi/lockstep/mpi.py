"""MPI, neither initialized nor finalized by being imported: `start` and `World.end` do that."""

import mpi4py

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
from mpi4py import MPI  # noqa: E402


def mpi_library() -> str:
    """Name and version of the MPI library; may be asked before it is initialized."""
    name = MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0 ")
    return " ".join(name.replace("Version:", "").split())


def threads_may_call() -> bool:
    """Whether several threads may call MPI at once."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


__all__ = ["MPI", "mpi_library", "threads_may_call"]
