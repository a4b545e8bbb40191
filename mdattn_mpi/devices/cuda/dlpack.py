"""Arrays for other libraries, by DLPack: what cuda.core can't export yet, bfloat16 above all."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

CUDA = 2
NAME = b"dltensor"
CODES = {
    **dict.fromkeys(("int8", "int16", "int32", "int64"), 0),
    **dict.fromkeys(("uint8", "uint16", "uint32", "uint64"), 1),
    **dict.fromkeys(("float16", "float32", "float64"), 2),
    "bfloat16": 4,
    "bool": 6,
}


class Tensor(ctypes.Structure):
    """DLPack's description of an array."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_shared: dict[int, tuple[Any, ...]] = {}  # what consumers hold, by the address of its `_Managed`


def _delete(managed: int) -> None:
    _shared.pop(managed, None)


def _forget(capsule: int) -> None:
    """Let go of what no consumer took; a consumer has given its capsule another name."""
    if _is_valid(capsule, NAME):
        _delete(_pointer(capsule, NAME))


_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_deleter, _destructor = _callback(_delete), _callback(_forget)

_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def capsule(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    ordinal: int,
    owner: Any,
) -> Any:
    """Make a DLPack capsule of an array on GPU `ordinal`; `owner` lives as long as it is used."""
    extents, steps = ((ctypes.c_int64 * len(shape))(*numbers) for numbers in (shape, strides))
    managed = _Managed()
    tensor = managed.tensor
    tensor.data, tensor.device_type, tensor.device_id = address, CUDA, ordinal
    tensor.ndim, tensor.code, tensor.lanes = len(shape), CODES[str(dtype)], 1
    tensor.bits = 8 * dtype.itemsize
    tensor.shape = ctypes.cast(extents, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    at = ctypes.addressof(managed)
    _shared[at] = managed, extents, steps, owner
    return _new(at, NAME, ctypes.cast(_destructor, ctypes.c_void_p))


@dataclass(frozen=True)
class Borrowed:
    """A contiguous array in GPU memory of a library to which a device has lent a stream.

    `owner` keeps the memory; the library computes in that stream and in no other.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ordinal: int
    owner: Any

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        return tuple(prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))

    def __dlpack_device__(self) -> tuple[int, int]:
        """CUDA, and which GPU."""
        return CUDA, self.ordinal

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """Show the memory. Whoever asks knows the stream, and waits for it."""
        where = self.address, self.shape, self.strides, self.dtype
        return capsule(*where, self.ordinal, self.owner)
