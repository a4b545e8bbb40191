"""Tensors that other people's files hold, as far as they could be query, key or value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdattn_mpi.dataset.hdf5 import Node, Value
from mdattn_mpi.errors import RejectedError

Array = np.ndarray[Any, np.dtype[Any]]
Slices = tuple[slice, ...]

KNOWN = ("float16", "bfloat16", "float32", "float64", "uint16", "int16")
BITS = ("uint16", "int16")  # integers that may be the bits of floats


def is_tensor(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether an array may be a query, key or value, or the sinks."""
    return shape != () and dtype.newbyteorder("=").name in KNOWN


def is_list(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether an array may be the segments or the window: integers in a row."""
    return len(shape) == 1 and dtype.kind in "iu"


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of 16, 32 or 64-bit floats, or of 16-bit integers that may be the bits of floats.

    `fetch` reads a part of it, unless it has a fault.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fetch: Callable[[Slices], Array]
    fault: RejectedError | None = None

    def take(self, dim: int, position: int) -> ForeignTensor:
        """One position of a dim, which is gone then."""

        def fetch(index: Slices) -> Array:
            one = slice(position, position + 1)
            return self.fetch((*index[:dim], one, *index[dim:])).squeeze(dim)

        return replace(self, shape=self.shape[:dim] + self.shape[dim + 1 :], fetch=fetch)

    def columns(self, start: int, stop: int) -> ForeignTensor:
        """A run of the last dim."""

        def fetch(index: Slices) -> Array:
            return self.fetch((*index[:-1], slice(start, stop)))[..., index[-1]]

        return replace(self, shape=(*self.shape[:-1], stop - start), fetch=fetch)

    def by_heads(self, heads: int) -> ForeignTensor:
        """The last dim as two: heads, and head dim."""
        dims = (heads, self.shape[-1] // heads)

        def fetch(index: Slices) -> Array:
            block = self.fetch((*index[:-2], slice(0, self.shape[-1])))
            return block.reshape(*block.shape[:-1], *dims)[..., index[-2], index[-1]]

        return replace(self, shape=(*self.shape[:-1], *dims), fetch=fetch)

    def as_bits(self, dtype: np.dtype[Any]) -> ForeignTensor:
        """Take integers as the bits of `dtype`."""

        def fetch(index: Slices) -> Array:
            block = self.fetch(index)
            return block.astype(block.dtype.newbyteorder("=")).view(dtype)

        return replace(self, dtype=dtype, fetch=fetch)


def of_array(array: Array) -> ForeignTensor:
    """Take an array that is in memory, or mapped there."""
    return ForeignTensor(array.shape, array.dtype, lambda index: array[index])


@dataclass(frozen=True)
class ForeignFile:
    """What a file holds: tensors by name, in HDF5 by path without the first slash.

    `lists` are integers in a row; those of 16 bits are tensors too. `others` is what else has a
    name, with its value where that is a number or text; `groups`, of HDF5, carry attributes.
    """

    tensors: dict[str, ForeignTensor] = field(default_factory=dict)
    lists: dict[str, ForeignTensor] = field(default_factory=dict)
    others: dict[str, Value | None] = field(default_factory=dict)
    groups: dict[str, Node] = field(default_factory=dict)

    def put(self, name: str, array: ForeignTensor, value: Value | None = None) -> None:
        """Note an array as all that it may be; `value` is that of its only element."""
        tensor, integers = (kind(array.shape, array.dtype) for kind in (is_tensor, is_list))
        if tensor:
            self.tensors[name] = array
        if integers:
            self.lists[name] = array
        if not tensor and (value is not None or not integers):
            self.others[name] = value


def stem_of(path: str) -> str:
    """The name of a file's only tensor."""
    return Path(path).stem or "tensor"
