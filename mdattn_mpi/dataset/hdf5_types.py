"""Sixteen-bit numbers in HDF5, never through HDF5's software conversion (0.03 GB/s).

NumPy and HDF5 have FP16; neither has BF16. Three encodings of BF16 are in use: a 16-bit HDF5 float
that describes itself (`h5dump` prints values, any h5py reads float32), ``uint16`` with an attribute
``dtype = "bfloat16"``, and the opaque ``V2`` that h5py makes of an ml_dtypes array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import h5py

from mdattn_mpi.dataset.dtypes import Stored
from mdattn_mpi.dataset.layout import Encoding
from mdattn_mpi.problem import DTypeName


class FloatFields(NamedTuple):
    """What decides the meaning of an HDF5 float of 16 bits, besides its byte order."""

    fields: tuple[int, ...]  # sign, exponent position and size, mantissa position and size
    bias: int
    precision: int = 16
    offset: int = 0
    norm: int = h5py.h5t.NORM_IMPLIED


_FIELDS: dict[FloatFields, DTypeName] = {
    FloatFields((15, 7, 8, 0, 7), 127): "bfloat16",
    FloatFields((15, 10, 5, 0, 10), 15): "float16",
}


def bfloat16_type() -> Any:
    """Make the 16-bit HDF5 float that describes BF16."""
    made = h5py.h5t.IEEE_F32LE.copy()
    made.set_fields(15, 7, 8, 0, 7)
    made.set_size(2)
    made.set_ebias(127)
    return made


def hdf5_type(dtype: DTypeName, encoding: Encoding = "float") -> Any:
    """Make the HDF5 type that stores `dtype`; FP16 has one encoding only."""
    if dtype == "float16":
        return h5py.h5t.IEEE_F16LE
    if encoding == "uint16":
        return h5py.h5t.STD_U16LE
    if encoding == "opaque":
        return h5py.h5t.create(h5py.h5t.OPAQUE, 2)
    return bfloat16_type()


def stored_as(hdf5: Any, dtype_attribute: Callable[[], str] = str) -> Stored | str:
    """Recognise an HDF5 type as BF16 or FP16, or say what it is instead.

    `dtype_attribute` gives the dataset's attribute ``dtype``, empty when there is none; it is asked
    for only where it matters.
    """
    kind, size = hdf5.get_class(), hdf5.get_size()
    if kind == h5py.h5t.FLOAT and size == 2:
        seen = FloatFields(
            hdf5.get_fields(),
            hdf5.get_ebias(),
            hdf5.get_precision(),
            hdf5.get_offset(),
            hdf5.get_norm(),
        )
        if seen not in _FIELDS:
            return f"a 16-bit float of fields {seen.fields} and bias {seen.bias}"
        return Stored(_FIELDS[seen], "float", hdf5.get_order() == h5py.h5t.ORDER_LE)
    if kind == h5py.h5t.INTEGER and size == 2:
        said = dtype_attribute()
        if said != "bfloat16":
            named = f"dtype={said!r}" if said else "no attribute dtype"
            return f"a 16-bit integer with {named}"
        return Stored("bfloat16", "uint16", hdf5.get_order() == h5py.h5t.ORDER_LE)
    if kind == h5py.h5t.OPAQUE and size == 2 and dtype_attribute() in ("", "bfloat16"):
        return Stored("bfloat16", "opaque")
    name = _CLASS_NAMES.get(kind, "an unknown type")
    return f"{name} of {size} bytes"


_CLASS_NAMES = {
    h5py.h5t.FLOAT: "a float",
    h5py.h5t.INTEGER: "an integer",
    h5py.h5t.OPAQUE: "an opaque type",
    h5py.h5t.STRING: "a string",
    h5py.h5t.COMPOUND: "a compound",
    h5py.h5t.ENUM: "an enum",
    h5py.h5t.ARRAY: "an array",
    h5py.h5t.VLEN: "a variable-length type",
    h5py.h5t.REFERENCE: "a reference",
}
