"""Sixteen-bit numbers in HDF5, never through HDF5's software conversion (0.03 GB/s).

NumPy and HDF5 have FP16; neither has BF16. Three encodings of BF16 are in use: a 16-bit HDF5 float
that describes itself (`h5dump` prints values, any h5py reads float32), ``uint16`` with an attribute
``dtype = "bfloat16"``, and the opaque ``V2`` that h5py makes of an ml_dtypes array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import h5py
import ml_dtypes
import numpy as np

from mdattn_mpi.dataset.layout import Encoding
from mdattn_mpi.problem import DTypeName

Array = np.ndarray[Any, np.dtype[Any]]

NUMPY: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Find the dtype that NumPy, or ml_dtypes, calls `name`."""
    return NUMPY[name] if name in NUMPY else np.dtype(name)


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


class Stored(NamedTuple):
    """How numbers are stored: their dtype, and the encoding of a BF16."""

    dtype: DTypeName
    encoding: Encoding
    little_endian: bool = True


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


def round_once(numbers: Array, dtype: np.dtype[Any]) -> Array:
    """Round floats of up to 64 bits to the nearest of `dtype`, ties to even; too large is infinity.

    ml_dtypes goes from float64 to BF16 by way of float32 and rounds twice. On the way here float32
    is rounded to odd, which keeps what decides the second rounding.
    """
    numbers = numbers.astype(numbers.dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if numbers.dtype == np.float64 and dtype == NUMPY["bfloat16"]:
            numbers = _rounded_to_odd(numbers)
        return numbers.astype(dtype, copy=False)


def _rounded_to_odd(wide: Array) -> Array:
    """Cut float64 to float32; the last bit becomes 1 where anything was cut off."""
    narrow = wide.astype(np.float32)
    inexact = (narrow != wide) & np.isfinite(wide)
    bits = narrow.view(np.uint32)
    bits -= inexact & (np.abs(narrow) > np.abs(wide))
    bits |= inexact
    return narrow
