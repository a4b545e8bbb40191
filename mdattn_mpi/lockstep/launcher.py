"""Who started this process, read from its environment before MPI is initialized."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mdattn_mpi.lockstep.process import Process

# Their names as processes; other daemons that start ranks outlive their jobs.
ONE_JOB = frozenset({"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun"})


@dataclass(frozen=True)
class Launcher:
    """Who started this process, and as which of how many. Unknown ranks are -1."""

    name: str = ""  # "mpirun", "srun", or nothing for a process that was started alone
    rank: int = 0
    size: int = 1
    local_rank: int = -1
    local_size: int = -1
    speaks: str = ""  # which MPI the launcher belongs to

    def __str__(self) -> str:
        return f"{self.name} of {self.speaks}" if self.name else "none"


# What launchers call rank, size, local rank and local size. Open MPI goes first: its mpirun starts
# its daemons by srun, whose variables then are those of the daemon. Slurm goes last: it also sets
# what PMI calls for when it serves that. A Slurm batch script has no SLURM_STEP_NUM_TASKS.
_DIALECTS = (
    (
        "mpirun",
        "Open MPI",
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    (
        "mpirun",
        "MPICH or Intel MPI",
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ),
    ("srun", "Slurm", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")),
)


def launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """Find out who started this process; not collective, and without MPI."""
    by_srun = "SLURM_STEP_NUM_TASKS" in environment and "SLURM_STEP_ID" in environment
    for name, speaks, variables in _DIALECTS:
        rank, size, local_rank, local_size = (
            _number(environment.get(variable, "")) for variable in variables
        )
        if rank < 0 or size < 1:
            continue
        if speaks == "MPICH or Intel MPI" and by_srun and local_size < 0:
            name, speaks = "srun", "Slurm (--mpi=pmi2)"
            local_rank = _number(environment.get("SLURM_LOCALID", ""))
        if speaks == "Slurm" and not by_srun:
            continue
        return Launcher(name, rank, size, local_rank, local_size, speaks)
    return Launcher()


def launcher_process() -> Process | None:
    """The mpirun above this process; None where it is on another node."""
    above = Process.look(os.getppid())
    while above and above.name not in ONE_JOB:
        above = Process.look(above.parent)
    return above


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1
