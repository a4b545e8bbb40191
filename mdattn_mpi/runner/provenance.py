"""Who computed an output, with what: goes into its attributes and the summary."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from mdattn_mpi.backends import Executor

PACKAGES = ("mdattn_mpi", "numpy", "h5py", "mpi4py", "ml_dtypes")


def provenance(executor: Executor) -> dict[str, str]:
    """Versions, device and command; never the environment."""
    return {
        "command": " ".join(sys.argv),
        "backend": executor.name,
        "device": ", ".join(f"{name} {value}" for name, value in executor.describe().items()),
        "versions": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{package} {_version(package)}" for package in PACKAGES]
        ),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
