"""DLPack capsules: what a consumer reads, and how long memory lives."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mdattn_mpi.devices.cuda import dlpack


class Owner:
    """Something that a capsule keeps alive."""


class Producer:
    """An array in host memory that says so, for NumPy to consume."""

    def __init__(self, array: Any, owner: Owner) -> None:
        self.array, self.owner = array, owner

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        strides = tuple(step // self.array.itemsize for step in self.array.strides)
        made = dlpack.capsule(
            self.array.ctypes.data, self.array.shape, strides, self.array.dtype, 0, self.owner
        )
        managed = dlpack._Managed.from_address(dlpack._pointer(id(made), dlpack.NAME))
        assert managed.tensor.device_type == dlpack.CUDA
        managed.tensor.device_type = 1  # NumPy takes host memory only
        return made


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_consumer_sees_the_array_and_keeps_its_owner(dtype: Any) -> None:
    array = np.random.default_rng(0).standard_normal((5, 4, 8)).astype(dtype)[:, 1:3]
    owner = Owner()
    alive = weakref.ref(owner)
    consumed = np.from_dlpack(Producer(array, owner))
    assert (consumed == array).all()
    assert consumed.strides == array.strides
    del owner
    gc.collect()
    assert alive() is not None
    del consumed
    gc.collect()
    assert alive() is None


def test_a_capsule_that_nobody_takes_lets_go() -> None:
    owner = Owner()
    alive = weakref.ref(owner)
    made = dlpack.capsule(1 << 20, (2, 3), (3, 1), np.dtype(ml_dtypes.bfloat16), 1, owner)
    managed = dlpack._Managed.from_address(dlpack._pointer(id(made), dlpack.NAME))
    tensor = managed.tensor
    assert (tensor.data, tensor.device_id, tensor.ndim) == (1 << 20, 1, 2)
    assert (tensor.code, tensor.bits, tensor.lanes) == (4, 16, 1)
    assert list(ctypes.cast(tensor.shape, ctypes.POINTER(ctypes.c_int64 * 2)).contents) == [2, 3]
    del owner, made
    gc.collect()
    assert alive() is None
