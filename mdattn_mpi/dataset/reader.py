"""Reading a dataset by shards.

Opening it looks at every selected item once: names, links, shapes, dtypes, storage. After that,
contiguous data is read with one `os.preadv` per span straight into the caller's array; chunked data
through HDF5 with the file's own type, so that nothing is converted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any

import h5py
import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY, Stored, stored_as
from mdattn_mpi.dataset.hdf5 import File, Node, Storage
from mdattn_mpi.dataset.layout import (
    DATASET_FORMAT,
    ITEMS,
    LAYOUTS,
    MAX_ITEMS,
    TENSORS,
    VERSION,
    Item,
    Layout,
    Tensor,
    batch_item_name,
    item_name_fault,
    natural_order,
    shown,
)
from mdattn_mpi.errors import ItemError, MdattnError, RejectedError
from mdattn_mpi.problem import AttentionProblem, Span, digest_of

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 4096  # blocks of the content that go into a digest, over all items
SAMPLE_BYTES = 4096
SCRATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorData:
    """One tensor of one item: what it looks like and where it lies."""

    tokens: int
    heads: int
    head_dim: int
    layout: Layout
    stored: Stored
    storage: Storage
    node: Node
    position: int | None = None  # in the batch dim
    crc32: int | None = None  # of the whole dataset, where its writer has noted it

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype."""
        return NUMPY[self.stored.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all heads."""
        return self.heads * self.head_dim * 2

    @property
    def nbytes(self) -> int:
        """Bytes of this item's part."""
        return self.tokens * self.token_bytes

    @property
    def offset(self) -> int | None:
        """Where this item's part begins in the file; None when only HDF5 can read it."""
        if self.storage.offset is None:
            return None
        return self.storage.offset + (self.position or 0) * self.nbytes


class Dataset:
    """An open dataset. `read` may be called from several threads.

    Attributes
    ----------
    path, size
        The file, and its bytes.
    items
        The selected items that can be done, in natural order of their names.
    faults
        The selected items that can't be; empty unless `open_dataset` was told to keep them.
    warnings
        What costs time or may be a mistake, one sentence each.

    """

    def __init__(self, file: File, entries: Sequence[_Entry], faults: Sequence[RejectedError]):
        ordered = sorted(entries, key=lambda entry: natural_order(entry.name))
        self._file = file
        self.path = file.path
        self.size = file.size
        self.items = tuple(
            Item(entry.name, index, entry.problem) for index, entry in enumerate(ordered)
        )
        self.faults = tuple(faults)
        self._tensors = {entry.name: entry.tensors for entry in ordered}
        self.warnings = tuple(self._warnings())

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def tensor(self, item: Item, tensor: Tensor) -> TensorData:
        """Describe one tensor of an item."""
        return self._tensors[item.name][tensor]

    def read(
        self,
        item: Item,
        tensor: Tensor,
        spans: Sequence[Span],
        heads: Span | None = None,
        out: Array | None = None,
    ) -> Array:
        """Read the tokens of `spans`, one span after the other.

        Parameters
        ----------
        item, tensor
            What to read: one of `items`; ``query``, ``key`` or ``value``.
        spans
            Runs of tokens.
        heads
            A run of heads; all of them when left out.
        out
            A contiguous array ``[tokens, heads, head_dim]`` of the item's dtype to read into.

        Returns
        -------
        numpy.ndarray
            `out`, or a new array like it: token-major, whatever the layout in the file.

        Raises
        ------
        ItemError
            The file can't be read there.

        """
        data = self._tensors[item.name][tensor]
        heads = heads or Span(0, data.heads)
        _check_runs(spans, data.tokens)
        _check_runs((heads,), data.heads)
        shape = (sum(len(span) for span in spans), len(heads), data.head_dim)
        if out is None:
            out = np.empty(shape, data.dtype)
        elif out.shape != shape or out.dtype != data.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype}{list(out.shape)}, want {data.dtype}{list(shape)}")
        bits = out.view(np.uint16)
        done = 0
        try:
            for span in spans:
                _read_span(data, span, heads, bits[done : done + len(span)])
                done += len(span)
        except MdattnError:
            raise
        except Exception as error:
            raise ItemError(
                f"{tensor} can't be read ({error})",
                fix="check the file with `mdattn inspect --check`; copy it again",
                file=data.node.file.path,
                item=item.name,
            ) from error
        return out

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the items' layout and samples of their content, whatever the path.

        At most `SAMPLES` blocks of the whole file are read: a change of a few numbers in a large
        file may go unseen, a changed file of the same shapes won't.
        """
        digest = hashlib.sha256()
        tensors = [
            (item, name, self._tensors[item.name][name]) for item in self.items for name in TENSORS
        ]
        every = -(-len(tensors) // SAMPLES)
        blocks = max(1, SAMPLES // max(1, len(tensors)))
        for number, (item, name, data) in enumerate(tensors):
            facts = [item.name, digest_of(asdict(item.problem)), name, data.layout, data.crc32]
            digest.update(json.dumps(facts).encode())
            if number % every == 0:
                for span in _sample_spans(data, blocks):
                    digest.update(self.read(item, name, (span,)).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, str | int]:
        """What an output remembers of its input."""
        return {
            "input_path": os.path.realpath(self.path),
            "input_size": self.size,
            "input_digest": self.digest,
        }

    def _warnings(self) -> list[str]:
        tensors = [data for found in self._tensors.values() for data in found.values()]
        swapped = sum(data.layout == "head_major" for data in tensors)
        indirect = [data for data in tensors if data.offset is None]
        warnings = []
        if swapped:
            warnings.append(
                f"{swapped} of {len(tensors)} tensors are head-major: a shard is then one run a "
                "head and has to be transposed, several times slower than token-major; "
                "`mdattn convert` rewrites them"
            )
        if indirect:
            warnings.append(
                f"{len(indirect)} of {len(tensors)} tensors aren't contiguous "
                f"({indirect[0].storage}): "
                "HDF5 reads them, on one thread; `mdattn convert` rewrites them"
            )
        return warnings


@dataclass(frozen=True)
class _Entry:
    name: str
    problem: AttentionProblem
    tensors: dict[Tensor, TensorData]


def open_dataset(
    path: str | os.PathLike[str],
    *,
    select: str = "*",
    layout: str = "auto",
    allow: Sequence[str] = (),
    keep_faults: bool = False,
) -> Dataset:
    """Open a dataset and look at every selected item.

    Parameters
    ----------
    path
        The file.
    select
        Names or globs, separated by commas. What no pattern matches isn't looked at.
    layout
        ``token_major`` or ``head_major`` overrules what the file says; ``auto`` doesn't.
    allow
        Folders that links in the file may lead to.
    keep_faults
        Put items that can't be done into `Dataset.faults` rather than raise the first.

    Raises
    ------
    RejectedError
        The file, or one of the selected items, is not as the format says.

    """
    if layout not in ("auto", *LAYOUTS):
        raise RejectedError(f"layout is {layout!r}", fix=f"use auto, {' or '.join(LAYOUTS)}")
    file = File(path, allow)
    try:
        found, faults = _find(file, _patterns(select), layout)
        if not keep_faults and faults:
            raise _first_of(faults)
        return Dataset(file, found, faults)
    except BaseException:
        file.close()
        raise


def check_format(root: Node, wanted: str) -> None:
    """Compare the root attributes ``format`` and ``version`` with what is wanted.

    Raises
    ------
    RejectedError
        They differ.

    """
    reject = root.file.reject
    found, version = root.attribute("format"), root.attribute("version")
    if found is None:
        raise reject(
            f"has no attribute format, so it is no {wanted}",
            "make one from it with `mdattn convert`",
        )
    if found != wanted:
        raise reject(
            f"format is {shown(str(found))!r}, not {wanted!r}",
            "name the other file: datasets and outputs are two formats",
        )
    if version != VERSION:
        raise reject(f"version is {version}, not {VERSION}", "use the mdattn that wrote it")


def _patterns(select: str) -> list[str]:
    patterns = [pattern.strip() for pattern in select.split(",") if pattern.strip()]
    if not patterns:
        raise RejectedError("no item is selected", fix="name items, or * for all")
    return patterns


def _find(
    file: File, patterns: Sequence[str], layout: str
) -> tuple[list[_Entry], list[RejectedError]]:
    root = file.root
    check_format(root, DATASET_FORMAT)
    group = root.child(ITEMS)
    if group is None or not group.is_group:
        raise file.reject(f"has no group /{ITEMS}", "see docs/file-format.md")
    default = layout if layout != "auto" else str(root.attribute("layout") or "token_major")
    names = sorted(group.names(MAX_ITEMS), key=natural_order)
    found: list[_Entry] = []
    faults: list[RejectedError] = []
    for name in names:
        if not any(_may_match(name, pattern) for pattern in patterns):
            continue
        try:
            entries = _entries(group, name, layout, default)
            if len(found) + len(entries) > MAX_ITEMS:
                raise file.reject(f"has more than {MAX_ITEMS} items", "split the file")
        except RejectedError as fault:
            fault.item = shown(name)
            if any(fnmatchcase(n, p) for n in (name, f"{name}.0") for p in patterns):
                faults.append(fault)
            continue
        found += [e for e in entries if any(fnmatchcase(e.name, p) for p in patterns)]
    _check_selection(file, patterns, names, found, faults)
    return found, faults


def _may_match(name: str, pattern: str) -> bool:
    """Whether `pattern` may match the item, or an entry of its batch dim."""
    literal = pattern.split("*")[0].split("?")[0].split("[")[0]
    batch = batch_item_name(name, 0)[:-1]
    return fnmatchcase(name, pattern) or batch.startswith(literal) or literal.startswith(batch)


def _check_selection(
    file: File,
    patterns: Sequence[str],
    names: Sequence[str],
    found: Sequence[_Entry],
    faults: Sequence[RejectedError],
) -> None:
    """Every pattern matches something, and every name is there once."""
    taken: set[str] = set()
    for entry in found:
        if entry.name in taken:
            raise file.reject(
                f"two items are called {entry.name!r}: one of them is an entry of a batch dim",
                "rename one of them",
            )
        taken.add(entry.name)
    taken |= {fault.item for fault in faults}
    if not names:
        raise file.reject(f"/{ITEMS} is empty", "put at least one item into it")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in taken):
            close = get_close_matches(pattern, [shown(name) for name in names[:10_000]], 3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see `mdattn inspect`"
            raise file.reject(f"no item matches {pattern!r}", hint)


def _first_of(faults: Sequence[RejectedError]) -> RejectedError:
    first = faults[0]
    more = f" (and {len(faults) - 1} more items are bad)" if len(faults) > 1 else ""
    return RejectedError(
        first.what + more,
        fix=f"{first.fix}; `mdattn inspect` lists all, --items leaves some out",
        file=first.file,
        item=first.item,
    )


def _entries(group: Node, name: str, layout: str, default: str) -> list[_Entry]:
    """Look at one item, or at all entries of its batch dim."""
    reject = group.file.reject
    fault = item_name_fault(name)
    if fault:
        raise reject(f"its name {fault}", "rename it")
    item = group.child(name)
    if item is None or not item.is_group:
        raise reject("is no group", f"store it as /{ITEMS}/{name}/query, key and value")
    chosen = str(item.attribute("layout") or default) if layout == "auto" else layout
    if chosen not in LAYOUTS:
        raise reject(f"layout is {shown(chosen)!r}", f"use {' or '.join(LAYOUTS)}")
    tensors = {tensor: _tensor(item, tensor, chosen) for tensor in TENSORS}
    problem = _problem(item, tensors)
    query = tensors["query"]
    if len(query.storage.shape) == 3:
        return [_Entry(name, problem, tensors)]
    return [
        _Entry(
            batch_item_name(name, position),
            problem,
            {tensor: replace(data, position=position) for tensor, data in tensors.items()},
        )
        for position in range(query.storage.shape[0])
    ]


def _tensor(item: Node, tensor: Tensor, layout: str) -> TensorData:
    reject = item.file.reject
    node = item.child(tensor)
    if node is None or not node.is_dataset:
        raise reject(f"has no dataset {tensor!r}", f"write its {tensor}")
    storage = node.storage()
    if len(storage.shape) not in (3, 4):
        raise reject(
            f"{tensor} has shape {list(storage.shape)}",
            "use [S, N, H], or [B, S, N, H] for B items",
        )
    with node.file.guard(node.path):
        stored = stored_as(node.id.get_type(), str(node.attribute("dtype") or ""))
    if isinstance(stored, str):
        raise reject(
            f"{tensor} holds {stored}; only BF16 and FP16 can be read",
            "rewrite it with `mdattn convert`; uint16 takes the attribute dtype='bfloat16'",
        )
    if not stored.little_endian:
        raise reject(f"{tensor} is big-endian", "rewrite it with `mdattn convert`")
    first, second, head_dim = storage.shape[-3:]
    tokens, heads = (first, second) if layout == "token_major" else (second, first)
    crc32 = node.attribute("crc32")
    return TensorData(
        tokens,
        heads,
        head_dim,
        "token_major" if layout == "token_major" else "head_major",
        stored,
        storage,
        node,
        crc32=crc32 if isinstance(crc32, int) else None,
    )


def _problem(item: Node, tensors: dict[Tensor, TensorData]) -> AttentionProblem:
    """Compare the three tensors with one another, and make one problem of them."""
    reject = item.file.reject
    query, key, value = (tensors[name] for name in TENSORS)

    def same(what: str, values: Sequence[object], fix: str) -> None:
        if len(set(values)) > 1:
            raise reject(
                f"{what} disagree: "
                + ", ".join(f"{n} {v}" for n, v in zip(TENSORS, values, strict=True)),
                fix,
            )

    same("dtypes", [d.stored.dtype for d in (query, key, value)], "store all three in one dtype")
    batch = [d.storage.shape[:-3] for d in (query, key, value)]
    same("batch dims", [b[0] if b else "none" for b in batch], "give all three the same")
    shapes = f"key is {list(key.storage.shape)} and value {list(value.storage.shape)}"
    if (key.tokens, key.heads) != (value.tokens, value.heads):
        raise reject(f"key and value disagree: {shapes}", "give both the same tokens and heads")
    if query.head_dim != key.head_dim:
        raise reject(
            f"head dims disagree: query {query.head_dim}, key {key.head_dim}",
            "give query and key the same head dim",
        )
    causal, scale = item.attribute("causal"), item.attribute("scale")
    if isinstance(scale, str) or scale == 0:
        raise reject(f"scale is {scale!r}", "use a positive number, or leave it out for 1/√H")
    try:
        return AttentionProblem(
            q_tokens=query.tokens,
            kv_tokens=key.tokens,
            q_heads=query.heads,
            kv_heads=key.heads,
            head_dim=query.head_dim,
            v_head_dim=value.head_dim,
            dtype=query.stored.dtype,
            causal=str(causal) if causal is not None else "none",  # type: ignore[arg-type]
            scale=float(scale) if scale is not None else 0.0,
        )
    except RejectedError as error:
        raise reject(f"{error.what} (shapes {_shapes(tensors)})", error.fix) from None


def _shapes(tensors: dict[Tensor, TensorData]) -> str:
    return ", ".join(f"{name} {list(data.storage.shape)}" for name, data in tensors.items())


def _check_runs(spans: Sequence[Span], length: int) -> None:
    for span in spans:
        if not 0 <= span.start <= span.stop <= length:
            raise ValueError(f"{span} is not within {length}")


def _read_span(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Read one run of tokens into `bits`, ``[tokens, heads, head_dim]`` of uint16."""
    if bits.size == 0:
        return
    if data.offset is None:
        _read_by_hdf5(data, span, heads, bits)
    elif data.layout == "head_major":
        _read_by_head(data, span, heads, bits)
    elif len(heads) < data.heads:
        _read_some_heads(data, span, heads, bits)
    else:
        start = data.offset + span.start * data.token_bytes
        read_exactly(data.node.file.fd, start, bits)


def _read_some_heads(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Read whole tokens by blocks and keep some heads: faster than one read a token."""
    assert data.offset is not None
    step = max(1, SCRATCH_BYTES // data.token_bytes)
    scratch = np.empty((min(step, len(span)), data.heads, data.head_dim), np.uint16)
    for first in range(0, len(span), step):
        part = scratch[: min(step, len(span) - first)]
        start = data.offset + (span.start + first) * data.token_bytes
        read_exactly(data.node.file.fd, start, part)
        bits[first : first + len(part)] = part[:, heads.slice]


def _read_by_head(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Read one run a head and interleave them."""
    assert data.offset is not None
    row = data.head_dim * 2
    step = max(1, SCRATCH_BYTES // row)
    scratch = np.empty((min(step, len(span)), data.head_dim), np.uint16)
    for column, head in enumerate(range(heads.start, heads.stop)):
        for first in range(0, len(span), step):
            part = scratch[: min(step, len(span) - first)]
            start = data.offset + (head * data.tokens + span.start + first) * row
            read_exactly(data.node.file.fd, start, part)
            bits[first : first + len(part), column] = part


def _read_by_hdf5(data: TensorData, span: Span, heads: Span, bits: Array) -> None:
    """Let HDF5 read chunks, with the file's own type: it has nothing to convert."""
    runs = [(span.start, len(span)), (heads.start, len(heads)), (0, data.head_dim)]
    if data.layout == "head_major":
        runs[:2] = runs[1::-1]
    batch = [(data.position, 1)] if data.position is not None else []
    start, count = zip(*batch, *runs, strict=True)
    target = bits if data.layout == "token_major" else np.empty(count[-3:], np.uint16)
    space = data.node.id.get_space()
    space.select_hyperslab(start, count)
    memory = h5py.h5s.create_simple((prod(count),))
    data.node.id.read(memory, space, target.reshape(-1), data.node.id.get_type())
    if target is not bits:
        bits[...] = target.swapaxes(0, 1)


def read_exactly(fd: int, offset: int, array: Array) -> None:
    """Fill a contiguous array from a file; `os.preadv` alone may stop short.

    Raises
    ------
    OSError
        The file ends before, or can't be read.

    """
    buffer = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}: it was cut while open")
        done += count


def _sample_spans(data: TensorData, blocks: int) -> list[Span]:
    """Choose runs of tokens all over a tensor; only its ends where reading is dear."""
    size = max(1, SAMPLE_BYTES // data.token_bytes)
    if data.offset is None:
        size, blocks = 1, 2
    if blocks * size >= data.tokens:
        return [Span(0, data.tokens)]
    last = data.tokens - size
    starts = {last * block // max(1, blocks - 1) for block in range(blocks)}
    return [Span(start, start + size) for start in sorted(starts)]
