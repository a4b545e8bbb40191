"""What a rank knows about itself and its node, without asking any other rank."""

from __future__ import annotations

import os
import platform
import resource
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mdattn_mpi.devices.nccl import nccl_libraries
from mdattn_mpi.doctor.filesystem import folder_facts
from mdattn_mpi.doctor.gpus import gpu_facts

PACKAGES = (
    "mdattn_mpi", "mpi4py", "numpy", "h5py", "ml_dtypes", "nccl4py", "cuda-core", "cuda-bindings",
    "nvidia-cudnn-frontend", "tensorrt", "tensorrt-rtx",
)  # fmt: skip
# What changes how ranks talk; a node that has another value than the rest is suspect.
SETTINGS = (
    "NCCL_", "UCX_", "FI_", "MPIR_CVAR_", "HDF5_", "CUDA_", "OMP_NUM_THREADS", "OMPI_MCA_btl",
    "OMPI_MCA_pml", "OMPI_MCA_mtl", "OMPI_MCA_coll",
)  # fmt: skip
INFINIBAND = Path("/sys/class/infiniband")


def gather_facts(folder: str) -> dict[str, Any]:
    """Everything that the local checks need, as JSON can hold it."""
    return {
        "host": os.uname().nodename,
        "kernel": platform.release(),
        "python": f"{platform.python_version()} ({sys.prefix})",
        "packages": {name: found for name in PACKAGES if (found := package(name))},
        "cores": sorted(os.sched_getaffinity(0)),
        "siblings": [first_thread(core) for core in sorted(os.sched_getaffinity(0))],
        "all_cores": os.cpu_count(),
        "limits": {
            "memlock": limit(resource.RLIMIT_MEMLOCK),
            "nofile": limit(resource.RLIMIT_NOFILE),
            "stack": limit(resource.RLIMIT_STACK),
        },
        "shm": space("/dev/shm"),
        "sessions": stale_sessions(tempfile.gettempdir()),
        "infiniband": sorted(os.listdir(INFINIBAND)) if INFINIBAND.is_dir() else [],
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "settings": settings(os.environ),
        "slurm": {name: os.environ[name] for name in SLURM if name in os.environ},
        "nccl": nccl_libraries(os.environ),
        "gpus": gpu_facts(),
        "folder": folder_facts(folder),
    }


SLURM = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_GPUS_PER_TASK", "SLURM_JOB_ID")


def package(name: str) -> str:
    """Version of an installed package, or nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def first_thread(core: int) -> int:
    """The first hardware thread of the physical core that has the thread numbered `core`."""
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        return int(siblings.read_text().replace("-", ",").partition(",")[0])
    except (OSError, ValueError):
        return core


def limit(which: int) -> int:
    """A soft limit; -1 for none."""
    soft, _ = resource.getrlimit(which)
    return -1 if soft == resource.RLIM_INFINITY else soft


def space(path: str) -> dict[str, int]:
    """Bytes in all, and free for us, of the file system at `path`; empty if it isn't there."""
    try:
        found = os.statvfs(path)
    except OSError:
        return {}
    return {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def stale_sessions(folder: str) -> list[str]:
    """This user's session folders of Open MPI (``ompi.PID``) whose mpirun is gone."""
    found = []
    for session in Path(folder).glob("ompi.[0-9]*"):
        with suppress(OSError):  # another one tidies up
            if (
                session.stat().st_uid == os.getuid()
                and not Path("/proc", session.suffix[1:]).exists()
            ):
                found.append(str(session))
    return sorted(found)


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that steer the libraries."""
    return {name: value for name, value in environment.items() if name.startswith(SETTINGS)}
