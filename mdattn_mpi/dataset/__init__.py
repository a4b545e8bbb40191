"""The files: what they look like, reading by shard, writing, and the ledger."""

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
