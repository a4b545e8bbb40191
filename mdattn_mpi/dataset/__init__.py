"""The files: what they look like, reading by shard, writing, and the ledger.

A name is imported on its first use: a rank opens no module that it doesn't need, and h5py only
where a file is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdattn_mpi.dataset.dtypes import NUMPY, numpy_dtype
    from mdattn_mpi.dataset.layout import (
        TENSORS,
        AnyItem,
        Item,
        Layout,
        ModelItem,
        State,
        Tensor,
    )
    from mdattn_mpi.dataset.ledger import Entry, Ledger
    from mdattn_mpi.dataset.making import DatasetWriter
    from mdattn_mpi.dataset.output import Output, open_output
    from mdattn_mpi.dataset.reader import Dataset, open_dataset
    from mdattn_mpi.dataset.scanner import scan_file
    from mdattn_mpi.dataset.tensors import TensorFile
    from mdattn_mpi.dataset.tokens import TokenFile, open_tokens
    from mdattn_mpi.dataset.writer import create_output

_HOMES = {
    "NUMPY": "dtypes",
    "numpy_dtype": "dtypes",
    "TENSORS": "layout",
    "AnyItem": "layout",
    "Item": "layout",
    "Layout": "layout",
    "ModelItem": "layout",
    "State": "layout",
    "Tensor": "layout",
    "Entry": "ledger",
    "Ledger": "ledger",
    "DatasetWriter": "making",
    "Output": "output",
    "open_output": "output",
    "Dataset": "reader",
    "open_dataset": "reader",
    "scan_file": "scanner",
    "TensorFile": "tensors",
    "TokenFile": "tokens",
    "open_tokens": "tokens",
    "create_output": "writer",
}

__all__ = [
    "NUMPY",
    "TENSORS",
    "AnyItem",
    "Dataset",
    "DatasetWriter",
    "Entry",
    "Item",
    "Layout",
    "Ledger",
    "ModelItem",
    "Output",
    "State",
    "Tensor",
    "TensorFile",
    "TokenFile",
    "create_output",
    "numpy_dtype",
    "open_dataset",
    "open_output",
    "open_tokens",
    "scan_file",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
