"""Making a dataset: contiguous, tensor after tensor, with a checksum of each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mdattn_mpi.dataset.dtypes import hdf5_type
from mdattn_mpi.dataset.layout import (
    DATASET_FORMAT,
    ITEMS,
    TENSORS,
    VERSION,
    Encoding,
    Item,
    Layout,
    Tensor,
)
from mdattn_mpi.dataset.positioned import write_exactly
from mdattn_mpi.dataset.writer import add_group, allocate, new_file, put_attributes
from mdattn_mpi.problem import AttentionProblem

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class _Place:
    """Where the next bytes of a tensor go, and the checksum of those before."""

    group: Any
    at: int
    stop: int
    crc32: int = 0


class DatasetWriter:
    """Fills a dataset that `create_dataset` has made."""

    def __init__(self, fd: int, places: dict[tuple[str, Tensor], _Place]) -> None:
        self._fd = fd
        self._places = places

    def append(self, item: Item, tensor: Tensor, block: Array) -> None:
        """Write the next elements of a tensor, in the order of the file."""
        place = self._places[item.name, tensor]
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        if place.at + len(data) > place.stop:
            raise ValueError(f"too much data for {item.name}/{tensor}")
        write_exactly(self._fd, place.at, data)
        place.crc32 = zlib.crc32(data, place.crc32)
        place.at += len(data)

    def finish(self) -> None:
        """Note the checksums; every tensor must be complete."""
        for (name, tensor), place in self._places.items():
            if place.at != place.stop:
                raise ValueError(f"{name}/{tensor} lacks {place.stop - place.at} bytes")
        for name in dict.fromkeys(name for name, _ in self._places):
            places = [self._places[name, tensor] for tensor in TENSORS]
            crc32s = np.array([place.crc32 for place in places], "<u4")
            put_attributes(places[0].group.id, {"crc32": crc32s})


@contextmanager
def create_dataset(
    path: str | os.PathLike[str],
    items: Sequence[Item],
    *,
    encoding: Encoding = "float",
    layout: Layout = "token_major",
    overwrite: bool = False,
) -> Iterator[DatasetWriter]:
    """Make a dataset of `items`; the file is there once the block has filled all of it.

    Raises
    ------
    RejectedError
        It exists (without `overwrite`), its folder doesn't, or the filesystem has no room.

    """
    nbytes = sum(2 * prod(shape) for item in items for shape in shapes(item.problem).values())
    with new_file(path, nbytes + 4096 * (len(items) + 1), overwrite=overwrite) as file:
        put_attributes(file.id, {"format": DATASET_FORMAT, "version": VERSION, "layout": layout})
        folder = add_group(file, ITEMS)
        places = {
            (item.name, tensor): place
            for item in items
            for tensor, place in _create_item(folder, item, encoding, layout).items()
        }
        writer = DatasetWriter(file.id.get_vfd_handle(), places)
        yield writer
        writer.finish()


def shapes(problem: AttentionProblem) -> dict[Tensor, tuple[int, int, int]]:
    """Token-major shapes of the three tensors."""
    return {
        "query": (problem.q_tokens, problem.q_heads, problem.head_dim),
        "key": (problem.kv_tokens, problem.kv_heads, problem.head_dim),
        "value": (problem.kv_tokens, problem.kv_heads, problem.v_head_dim),
    }


def _create_item(
    folder: Any, item: Item, encoding: Encoding, layout: Layout
) -> dict[Tensor, _Place]:
    group = add_group(folder, item.name)
    put_attributes(group.id, {"causal": item.problem.causal, "scale": item.problem.scale})
    places = {}
    for tensor in TENSORS:
        shape = shapes(item.problem)[tensor]
        stored = (shape[1], shape[0], shape[2]) if layout == "head_major" else shape
        start = allocate(group, tensor, stored, hdf5_type(item.problem.dtype, encoding))
        if encoding != "float" and item.problem.dtype == "bfloat16":
            put_attributes(group[tensor].id, {"dtype": "bfloat16"})
        places[tensor] = _Place(group, start, start + 2 * prod(shape))
    return places
