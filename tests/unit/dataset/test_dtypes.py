"""BF16 in its three encodings and FP16, recognised by what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from mdattn_mpi.dataset.dtypes import NUMPY, Stored
from mdattn_mpi.dataset.hdf5_types import hdf5_type, stored_as

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


def test_any_h5py_reads_our_bfloat16_as_the_numbers_that_it_holds(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        stored = hdf5_type("bfloat16")
        made = h5py.h5d.create(file.id, b"x", stored, h5py.h5s.create_simple((1 << 16,)))
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, ALL_BITS, stored)
        read = file["x"][:]
    wanted = ALL_BITS.view(ml_dtypes.bfloat16).astype(np.float32)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("encoding", ["float", "uint16", "opaque"])
def test_what_is_written_is_recognised(dtype: Any, encoding: Any) -> None:
    stored = hdf5_type(dtype, encoding)
    wanted = "float" if dtype == "float16" else encoding
    attribute = "bfloat16" if wanted == "uint16" else ""
    assert stored_as(stored, lambda: attribute) == Stored(dtype, wanted)
    assert stored.get_size() == NUMPY[dtype].itemsize == 2


def test_what_h5py_makes_of_ml_dtypes_is_recognised(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("x", data=np.ones(3, ml_dtypes.bfloat16))
        assert stored_as(made.id.get_type()) == Stored("bfloat16", "opaque")


def test_byte_order_is_noticed() -> None:
    big = stored_as(h5py.h5t.IEEE_F16BE)
    assert isinstance(big, Stored)
    assert not big.little_endian


def odd_floats() -> list[Any]:
    """16-bit floats that are neither: other bias, other fields."""
    other_bias = hdf5_type("bfloat16").copy()
    other_bias.set_ebias(126)
    other_fields = h5py.h5t.IEEE_F16LE.copy()
    other_fields.set_fields(15, 9, 6, 0, 9)
    return [other_bias, other_fields]


@pytest.mark.parametrize(
    ("stored", "attribute", "said"),
    [
        (h5py.h5t.IEEE_F32LE, "", "a float of 4 bytes"),
        (h5py.h5t.STD_U16LE, "", "no attribute dtype"),
        (h5py.h5t.STD_U16LE, "float16", "float16"),
        (h5py.h5t.STD_I32LE, "bfloat16", "an integer of 4 bytes"),
        (h5py.h5t.create(h5py.h5t.OPAQUE, 3), "", "an opaque type of 3 bytes"),
        (h5py.h5t.C_S1, "", "a string"),
        *((odd, "", "a 16-bit float of fields") for odd in odd_floats()),
    ],
)
def test_anything_else_is_named(stored: Any, attribute: str, said: str) -> None:
    found = stored_as(stored, lambda: attribute)
    assert isinstance(found, str)
    assert said in found
