"""Datasets written by plain h5py, in every way that the format allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)


@dataclass
class How:
    """How to store the tensors."""

    encoding: str = "float"  # of BF16
    layout: str = "token_major"
    storage: dict[str, Any] = field(default_factory=dict)  # h5py's keyword arguments


def random_tensors(
    shape: tuple[int, int, int, int, int, int] = (37, 23, 4, 2, 16, 24),
    *,
    dtype: np.dtype[Any] = BFLOAT16,
    batch: tuple[int, ...] = (),
    seed: int | None = None,
) -> dict[str, Array]:
    """Token-major query, key and value for ``Sq, Skv, Nq, Nkv, H, Hv``; any bit pattern."""
    draw = np.random.default_rng(seed)
    q, kv, q_heads, kv_heads, dim, v_dim = shape
    return {
        name: draw.integers(0, 1 << 16, (*batch, *extent), np.uint16).view(dtype)
        for name, extent in (
            ("query", (q, q_heads, dim)),
            ("key", (kv, kv_heads, dim)),
            ("value", (kv, kv_heads, v_dim)),
        )
    }


def same_bits(a: Array, b: Array) -> bool:
    """Equality of shape and bits: NaN equals itself, -0 differs from 0."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def write_tensor(group: Any, name: str, array: Array, how: How) -> Any:
    """Write one token-major array as `how` says."""
    if how.layout == "head_major":
        array = array.swapaxes(-3, -2)
    array = np.ascontiguousarray(array)
    if array.dtype != BFLOAT16:
        return group.create_dataset(name, data=array, **how.storage)
    if how.encoding == "uint16":
        made = group.create_dataset(name, data=array.view(np.uint16), **how.storage)
        made.attrs["dtype"] = "bfloat16"
        return made
    if how.encoding == "opaque":
        return group.create_dataset(name, data=array, **how.storage)
    stored = h5py.h5t.IEEE_F32LE.copy()
    stored.set_fields(15, 7, 8, 0, 7)
    stored.set_size(2)
    stored.set_ebias(127)
    made = group.create_dataset(name, array.shape, h5py.Datatype(stored), **how.storage)
    made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, array.view(np.uint16), stored)
    return made


def write_dataset(
    path: Path,
    items: dict[str, dict[str, Array]],
    how: How | None = None,
    attributes: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write a dataset of token-major `items`, with attributes for some."""
    how = how or How()
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "mdattn-dataset"
        file.attrs["version"] = 1
        if how.layout != "token_major":
            file.attrs["layout"] = how.layout
        for name, tensors in items.items():
            group = file.create_group(f"items/{name}")
            group.attrs.update((attributes or {}).get(name, {}))
            for tensor, array in tensors.items():
                write_tensor(group, tensor, array, how)
