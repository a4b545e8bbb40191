"""Making a dataset: contiguous, tensor after tensor, with a checksum of each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mdattn_mpi.dataset.hdf5_types import hdf5_type
from mdattn_mpi.dataset.layout import (
    BESIDE,
    DATASET_FORMAT,
    ITEMS,
    TENSORS,
    TOKEN_DTYPES,
    VERSION,
    Encoding,
    Item,
    Layout,
    Tensor,
    item_name_fault,
    problem_of,
)
from mdattn_mpi.dataset.positioned import write_exactly
from mdattn_mpi.dataset.writer import add_group, allocate, new_file, put_attributes, write_array
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import UNBOUNDED
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
    items
        Those that are known before: a filesystem without room for them is refused at once, and
        `append` fills them.
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
        items: Sequence[Item] = (),
        *,
        encoding: Encoding = "float",
        layout: Layout = "token_major",
        overwrite: bool = False,
    ) -> None:
        self._path = os.fspath(path)
        self._items = items
        sizes = (prod(shape) for item in items for shape in shapes(item.problem).values())
        nbytes = 2 * sum(sizes) + 4096 * (len(items) + 1)
        self._file = new_file(path, nbytes, overwrite=overwrite)
        self._encoding: Encoding = encoding
        self._layout: Layout = layout
        self._places: dict[tuple[str, str], _Place] = {}
        self._names: set[str] = set()

    def __enter__(self) -> DatasetWriter:
        with ExitStack() as undo:
            file = undo.enter_context(self._file)
            put_attributes(
                file.id, {"format": DATASET_FORMAT, "version": VERSION, "layout": self._layout}
            )
            self._folder = add_group(file, ITEMS)
            self._fd = file.id.get_vfd_handle()
            for item in self._items:
                self.reserve(item)
            undo.push(self._finish)
            self._open = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(
        self,
        name: str,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: Causal = "none",
        scale: Any = None,
        window: tuple[int, int] = UNBOUNDED,
        softcap: float = 0.0,
        sinks: Array | None = None,
        segments: Sequence[int] = (),
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
        window, softcap, segments
            As of `mdattn_mpi.attention`.
        sinks
            ``[Nq]``, float32: a score a head that takes weight and has no value.

        Raises
        ------
        RejectedError
            There is an item of that name, or the arrays or options can't be.

        """
        try:
            masks = {"window": window, "softcap": softcap, "segments": tuple(segments)}
            problem = _problem_of((q, k, v), causal, scale, sinks=sinks is not None, **masks)
            item = Item(name, len(self._names), problem)
            if sinks is not None:
                _check_sinks(sinks, problem)
            self.reserve(item)
        except RejectedError as error:
            error.file, error.item = self._path, name
            raise
        for tensor, array in zip(TENSORS, (q, k, v), strict=True):
            whole = array.transpose(1, 0, 2) if self._layout == "head_major" else array
            self.append(item, tensor, whole)
        if sinks is not None:
            self.append(item, "sinks", sinks)

    def add_tokens(
        self, name: str, input_ids: Array, segments: Array | None = None, names: Sequence[str] = ()
    ) -> None:
        """Write an item of token ids whole.

        Parameters
        ----------
        name
            The item's.
        input_ids
            ``[S]``, of uint16, uint32, int32 or int64.
        segments
            ``[documents]``: the first token of each document that is packed into it, 0 the first.
        names
            What the documents are called, for people.

        Raises
        ------
        RejectedError
            There is an item of that name, or the arrays can't be.

        """
        arrays = {"input_ids": _little_endian(input_ids)}
        if segments is not None:
            arrays["segments"] = _little_endian(segments)
        fault = _token_fault(arrays)
        if fault:
            fix = "give [tokens] of integers, and the first token of each document, ascending"
            raise RejectedError(fault, fix=fix, file=self._path, item=name)
        self._take(name)
        group = add_group(self._folder, name)
        if names:
            arrays["names"] = np.array([text.encode() for text in names])
        for tensor, array in arrays.items():
            write_array(group, tensor, array)
        crc32s = [zlib.crc32(arrays[each].data) for each in TOKEN_DTYPES if each in arrays]
        put_attributes(group.id, {"crc32": np.array(crc32s, "<u4")})

    def reserve(self, item: Item) -> None:
        """Make room for an item; `append` fills it.

        Raises
        ------
        RejectedError
            There is an item of that name, or it can't be a name.

        """
        self._take(item.name)
        for tensor, place in _create_item(self._folder, item, self._encoding, self._layout).items():
            self._places[item.name, tensor] = place

    def _take(self, name: str) -> None:
        fault = item_name_fault(name)
        if fault or name in self._names:
            raise RejectedError(
                f"its name {fault}" if fault else "is in the dataset already",
                fix="give it another name",
                file=self._path,
                item=name,
            )
        self._names.add(name)

    def append(self, item: Item, tensor: str, block: Array) -> None:
        """Write the next elements of a tensor, or of the sinks, in the order of the file."""
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
            every = ((name, tensor) for tensor in (*TENSORS, *BESIDE))
            places = [self._places[each] for each in every if each in self._places]
            crc32s = np.array([place.crc32 for place in places], "<u4")
            put_attributes(places[0].group.id, {"crc32": crc32s})


def _problem_of(qkv: Sequence[Array], causal: Causal, scale: Any, **masks: Any) -> AttentionProblem:
    what = ", ".join(f"{array.dtype} {list(array.shape)}" for array in qkv)
    if {array.ndim for array in qkv} != {3}:
        raise RejectedError(f"q, k, v are {what}", fix="give [tokens, heads, head dim] each")
    if len({array.dtype for array in qkv}) > 1:
        raise RejectedError(f"q, k, v are {what}", fix="give all three one dtype")
    try:
        shapes = [array.shape for array in qkv]
        return problem_of(shapes, str(qkv[0].dtype), causal, scale, **masks)
    except RejectedError as error:
        raise RejectedError(f"{error.what} (q, k, v are {what})", fix=error.fix) from None


def _check_sinks(sinks: Array, problem: AttentionProblem) -> None:
    if sinks.shape != (problem.q_heads,) or sinks.dtype != np.float32:
        raise RejectedError(
            f"sinks are {sinks.dtype} {list(sinks.shape)}",
            fix=f"give [{problem.q_heads}] of float32, one for each query head",
        )


def _little_endian(numbers: Any) -> Array:
    array = np.asarray(numbers, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _token_fault(arrays: dict[str, Array]) -> str:
    """Say what is wrong with token ids and segments; empty when nothing is."""
    for tensor, array in arrays.items():
        if array.ndim != 1 or not array.size or array.dtype.name not in TOKEN_DTYPES[tensor]:
            return f"{tensor} is {array.dtype} {list(array.shape)}"
    starts = arrays.get("segments", np.zeros(1, np.int64))
    inside = starts[0] == 0 and starts[-1] < len(arrays["input_ids"])
    return "" if inside and (np.diff(starts) > 0).all() else f"segments are {starts.tolist()[:8]}"


def shapes(problem: AttentionProblem) -> dict[Tensor, tuple[int, int, int]]:
    """Token-major shapes of the three tensors."""
    return {
        "query": (problem.q_tokens, problem.q_heads, problem.head_dim),
        "key": (problem.kv_tokens, problem.kv_heads, problem.head_dim),
        "value": (problem.kv_tokens, problem.kv_heads, problem.v_head_dim),
    }


def _create_item(folder: Any, item: Item, encoding: Encoding, layout: Layout) -> dict[str, _Place]:
    group, problem = add_group(folder, item.name), item.problem
    put_attributes(group.id, {"causal": problem.causal, "scale": problem.scale})
    if problem.window != UNBOUNDED:
        put_attributes(group.id, {"window": np.array(problem.window)})
    if problem.softcap:
        put_attributes(group.id, {"softcap": problem.softcap})
    places: dict[str, _Place] = {}
    for tensor in TENSORS:
        shape = shapes(item.problem)[tensor]
        stored = (shape[1], shape[0], shape[2]) if layout == "head_major" else shape
        start = allocate(group, tensor, stored, hdf5_type(item.problem.dtype, encoding))
        if encoding != "float" and item.problem.dtype == "bfloat16":
            put_attributes(group[tensor].id, {"dtype": "bfloat16"})
        places[tensor] = _Place(group, start, start + 2 * prod(shape))
    if problem.sinks:
        write_array(group, "sinks", np.zeros(problem.q_heads, "<f4"))
        start = group["sinks"].id.get_offset()
        places["sinks"] = _Place(group, start, start + 4 * problem.q_heads)
    if problem.segments:
        starts = np.array(problem.segments, "<i8")
        write_array(group, "segments", starts)
        places["segments"] = _Place(group, 0, 0, zlib.crc32(starts.data))
    return places
