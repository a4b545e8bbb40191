"""Making a dataset: contiguous, tensor after tensor, with a checksum of each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    item_name_fault,
)
from mdattn_mpi.dataset.positioned import write_exactly
from mdattn_mpi.dataset.writer import add_group, allocate, new_file, put_attributes
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Causal

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class _Place:
    """Where the next bytes of a tensor go, and the checksum of those before."""

    group: Any
    at: int
    stop: int
    crc32: int = 0


class DatasetWriter:
    """Makes a dataset, item by item; the file is there once the ``with`` block has ended well.

    Parameters
    ----------
    path
        The file.
    nbytes
        How large it will be, if that is known: a filesystem without that room is refused at once.
    encoding, layout
        How BF16 is stored, and which dim of a tensor comes first in the file.
    overwrite
        Whether a file may be there, which this one replaces.

    Raises
    ------
    RejectedError
        On entering: it exists (without `overwrite`), its folder doesn't, or there is no room. On
        leaving: the disk is full, or a tensor isn't complete.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        nbytes: int = 0,
        *,
        encoding: Encoding = "float",
        layout: Layout = "token_major",
        overwrite: bool = False,
    ) -> None:
        self._path = os.fspath(path)
        self._file = new_file(path, nbytes, overwrite=overwrite)
        self._encoding: Encoding = encoding
        self._layout: Layout = layout
        self._places: dict[tuple[str, Tensor], _Place] = {}
        self._open = ExitStack()

    def __enter__(self) -> DatasetWriter:
        file = self._open.enter_context(self._file)
        put_attributes(
            file.id, {"format": DATASET_FORMAT, "version": VERSION, "layout": self._layout}
        )
        self._folder = add_group(file, ITEMS)
        self._fd = file.id.get_vfd_handle()
        self._open.push(self._finish)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(
        self, name: str, q: Array, k: Array, v: Array, *, causal: Causal = "none", scale: Any = None
    ) -> None:
        """Write an item whole.

        Parameters
        ----------
        name
            The item's.
        q, k, v
            ``[Sq, Nq, H]``, ``[Skv, Nkv, H]`` and ``[Skv, Nkv, Hv]``, all in bfloat16
            (`ml_dtypes.bfloat16`) or all in float16.
        causal, scale
            The mask, and what scores are multiplied with (by default 1/√H).

        Raises
        ------
        RejectedError
            There is an item of that name, or the arrays or options can't be.

        """
        try:
            item = Item(
                name, len(self._places) // len(TENSORS), _problem_of(q, k, v, causal, scale)
            )
            self.reserve(item)
        except RejectedError as error:
            error.file, error.item = self._path, name
            raise
        for tensor, array in zip(TENSORS, (q, k, v), strict=True):
            whole = array.transpose(1, 0, 2) if self._layout == "head_major" else array
            self.append(item, tensor, whole)

    def reserve(self, item: Item) -> None:
        """Make room for an item; `append` fills it.

        Raises
        ------
        RejectedError
            There is an item of that name, or it can't be a name.

        """
        fault = item_name_fault(item.name)
        if fault or (item.name, TENSORS[0]) in self._places:
            raise RejectedError(
                f"its name {fault}" if fault else "is in the dataset already",
                fix="give it another name",
                file=self._path,
                item=item.name,
            )
        for tensor, place in _create_item(self._folder, item, self._encoding, self._layout).items():
            self._places[item.name, tensor] = place

    def append(self, item: Item, tensor: Tensor, block: Array) -> None:
        """Write the next elements of a tensor, in the order of the file."""
        place = self._places[item.name, tensor]
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        if place.at + len(data) > place.stop:
            raise ValueError(f"too much data for {item.name}/{tensor}")
        write_exactly(self._fd, place.at, data)
        place.crc32 = zlib.crc32(data, place.crc32)
        place.at += len(data)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        """Note the checksums; every tensor must be complete."""
        if kind:
            return
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
    """Make a dataset with room for all `items`, which the block fills.

    Raises
    ------
    RejectedError
        As `DatasetWriter`.

    """
    nbytes = sum(2 * prod(shape) for item in items for shape in shapes(item.problem).values())
    nbytes += 4096 * (len(items) + 1)
    with DatasetWriter(
        path, nbytes, encoding=encoding, layout=layout, overwrite=overwrite
    ) as writer:
        for item in items:
            writer.reserve(item)
        yield writer


def _problem_of(q: Array, k: Array, v: Array, causal: Causal, scale: Any) -> AttentionProblem:
    what = ", ".join(f"{array.dtype} {list(array.shape)}" for array in (q, k, v))
    if {array.ndim for array in (q, k, v)} != {3} or k.shape[:2] != v.shape[:2]:
        raise RejectedError(
            f"q, k, v are {what}",
            fix="give [tokens, heads, head dim] each, k and v with the same tokens and heads",
        )
    if q.shape[2] != k.shape[2] or len({array.dtype for array in (q, k, v)}) > 1:
        raise RejectedError(f"q, k, v are {what}", fix="give them one dtype, q and k one head dim")
    return AttentionProblem(
        q_tokens=len(q),
        kv_tokens=len(k),
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        v_head_dim=v.shape[2],
        dtype=str(q.dtype),  # type: ignore[arg-type]  # checked there
        causal=causal,
        scale=scale,
    )


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
