"""Who computed an output, with what: goes into its attributes and the summary."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from mdattn_mpi.backends import Backend

PACKAGES = ("mdattn_mpi", "numpy", "h5py", "mpi4py", "ml_dtypes")


def provenance(backend: Backend) -> dict[str, str]:
    """Versions, device and command; never the environment."""
    return {
        "command": " ".join(sys.argv),
        "backend": backend.name,
        "device": ", ".join(f"{name} {value}" for name, value in backend.describe().items()),
        "versions": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{package} {package_version(package)}" for package in PACKAGES]
        ),
    }


def package_version(package: str) -> str:
    """Version of an installed package, or that it isn't."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
