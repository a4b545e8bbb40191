"""Sixteen-bit numbers in memory: NumPy has FP16, ml_dtypes BF16."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Stored(NamedTuple):
    """How numbers are stored: their dtype, and the encoding of a BF16."""

    dtype: DTypeName
    encoding: Encoding
    little_endian: bool = True


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
