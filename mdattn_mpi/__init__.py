"""Exact attention over very long sequences on many ranks, in batch, under MPI.

``mdattn run`` does it for the items of a file; `attention` for the shards that the ranks of another
MPI program hold.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdattn_mpi.dataset import DatasetWriter, open_dataset
    from mdattn_mpi.dataset.results import open_output
    from mdattn_mpi.errors import (
        DeviceError,
        DisagreementError,
        InternalError,
        InterruptedJobError,
        ItemError,
        MdattnError,
        OutputError,
        RejectedError,
        VerificationError,
    )
    from mdattn_mpi.library import Attention, attention, shard_spans

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "DatasetWriter",
    "DeviceError",
    "DisagreementError",
    "InternalError",
    "InterruptedJobError",
    "ItemError",
    "MdattnError",
    "OutputError",
    "RejectedError",
    "VerificationError",
    "__version__",
    "attention",
    "open_dataset",
    "open_output",
    "shard_spans",
]

_HOMES = {
    "Attention": "library",
    "attention": "library",
    "shard_spans": "library",
    "DatasetWriter": "dataset",
    "open_dataset": "dataset",
    "open_output": "dataset.results",
}


def __getattr__(name: str) -> Any:
    """Load what a name needs on its first use: the package itself stays light."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
