"""What launchers say in the environment."""

from mdattn_mpi.lockstep import Launcher, launcher

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


def test_started_alone() -> None:
    assert launcher({}) == Launcher()
    assert launcher(BATCH) == Launcher()  # in a batch script, but not by srun


def test_each_dialect() -> None:
    assert launcher(OPEN_MPI) == Launcher("mpirun", 5, 8, 1, 4, "Open MPI")
    assert str(launcher(OPEN_MPI)) == "mpirun of Open MPI"
    assert launcher(HYDRA) == Launcher("mpirun", 2, 3, 2, 3, "MPICH or Intel MPI")
    assert launcher(SRUN) == Launcher("srun", 3, 4, 1, -1, "Slurm")


def test_srun_that_serves_pmi2_is_still_srun() -> None:
    found = launcher({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"})
    assert found == Launcher("srun", 3, 4, 1, -1, "Slurm (--mpi=pmi2)")


def test_mpirun_inside_an_allocation_wins_over_slurms_own_variables() -> None:
    assert launcher({**SRUN, **OPEN_MPI}).rank == 5
    assert launcher({**BATCH, **HYDRA}).size == 3


def test_nonsense_is_nobody() -> None:
    assert launcher({"PMI_RANK": "x", "PMI_SIZE": "3"}) == Launcher()
    assert launcher({"PMI_RANK": "0", "PMI_SIZE": "0"}) == Launcher()
