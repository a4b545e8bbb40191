"""The files: what they look like, reading by shard, writing, and the ledger."""

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.layout import TENSORS, Item, Layout, State, Tensor
from mdattn_mpi.dataset.ledger import Entry, Ledger
from mdattn_mpi.dataset.making import DatasetWriter, create_dataset
from mdattn_mpi.dataset.output import Output, open_output
from mdattn_mpi.dataset.reader import Dataset, open_dataset, scan_file
from mdattn_mpi.dataset.writer import create_output

__all__ = [
    "NUMPY",
    "TENSORS",
    "Dataset",
    "DatasetWriter",
    "Entry",
    "Item",
    "Layout",
    "Ledger",
    "Output",
    "State",
    "Tensor",
    "create_dataset",
    "create_output",
    "open_dataset",
    "open_output",
    "scan_file",
]
