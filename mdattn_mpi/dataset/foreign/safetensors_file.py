"""A .safetensors file: a header in JSON, then the tensors back to back."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from mdattn_mpi.dataset.foreign.tensor import Array, ForeignFile, ForeignTensor, of_array
from mdattn_mpi.dataset.layout import shown

MAX_HEADER_BYTES = 100 << 20  # of a .safetensors file; the format's own limit
DTYPES = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
}


def read(path: str) -> ForeignFile:
    """Eight bytes of header length, the header in JSON, the tensors back to back."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header claims {length} bytes")
        header = json.loads(file.read(length))
    content = np.memmap(path, np.uint8, "r", 8 + length) if size > 8 + length else np.zeros(0, "u1")
    found = ForeignFile()
    for name, about in header.items():
        if name == "__metadata__":
            found.others.update({key: text for key, text in about.items() if key != "format"})
        elif about["dtype"] in DTYPES:
            found.put(name, _of_header(name, about, content))
        else:
            found.others[name] = None
    return found


def _of_header(name: str, about: Mapping[str, Any], content: Array) -> ForeignTensor:
    dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
    start, stop = about["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{shown(name)} has shape {shape} at {start}:{stop}")
    if stop > content.size or stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{shown(name)} doesn't fit: {shape} at bytes {start}:{stop}")
    return of_array(content[start:stop].view(dtype).reshape(shape))
