"""Exact attention over very long sequences on many ranks, in batch, under MPI.

``mdattn run`` does it for the items of a file; `attention` for the shards that the ranks of another
MPI program hold.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdattn_mpi.library import attention, shard_spans

__all__ = ["attention", "shard_spans"]


def __getattr__(name: str) -> Any:
    """Load what the library needs on first use: the package itself stays light."""
    if name in __all__:
        return getattr(import_module("mdattn_mpi.library"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
