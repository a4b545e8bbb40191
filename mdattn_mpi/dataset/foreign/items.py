"""From the tensors of a foreign file to items: what their shapes and dtypes can mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.foreign.names import Names, match_names
from mdattn_mpi.dataset.foreign.packing import Packing, unpack
from mdattn_mpi.dataset.foreign.said import Surroundings
from mdattn_mpi.dataset.foreign.tensor import BITS, ForeignFile, ForeignTensor
from mdattn_mpi.dataset.layout import (
    LAYOUTS,
    TENSORS,
    Item,
    Layout,
    Tensor,
    batch_item_name,
    item_name_fault,
    problem_of,
    shown,
)
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import MAX_SEGMENTS
from mdattn_mpi.problem import AttentionProblem, DTypeName, Span

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Reading:
    """How the user says that a file is to be read. What is None he left open."""

    layout: Layout | None = None
    dtype: DTypeName | None = None  # to round to
    bits: DTypeName | None = None  # what 16-bit integers are the bits of
    packing: Packing = field(default_factory=Packing)
    causal: str | None = None
    scale: float | None = None
    masks: Mapping[str, Any] = field(default_factory=dict)  # window, softcap
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """An item to be, how to read tokens of its tensors, token-major, and its sinks, if any."""

    item: Item
    layout: Layout
    read: Callable[[Tensor, Span], Array]
    sinks: Array | None = None

    def __str__(self) -> str:
        """Its name, and its shape as it was understood."""
        return f"{self.item.name}: {self.item.problem}, {self.layout.replace('_', '-')}"


def find_sources(
    file: ForeignFile, path: str, patterns: Names | None, how: Reading
) -> list[Source]:
    """Make items of a file's tensors, as far as the user says `how`.

    `path` is for messages; `patterns` are names with stars, or None for those that are usual.

    Raises
    ------
    RejectedError
        Names, shapes, dtypes or attributes that make no item, or could make two different ones.

    """
    names = match_names(file, patterns, path)
    matched = {name for found in names.values() for name in found}
    surroundings = Surroundings(file, path, matched, how.ignore)
    sources: list[Source] = []
    for item, found in names.items():
        try:
            parts = [file.tensors[name] for name in found]
            sources += _sources(item, parts, surroundings.options(found), how)
        except RejectedError as error:
            error.item, error.file = error.item or shown(item), error.file or path
            raise
    return _numbered(sources, path)


def _numbered(sources: Sequence[Source], path: str) -> list[Source]:
    """Give items their positions; no two may have the same name."""
    names: set[str] = set()
    numbered = []
    for index, source in enumerate(sources):
        name, problem = source.item.name, source.item.problem
        if name in names:
            raise RejectedError(
                f"two items would be called {name!r}: one of them is an entry of a batch dim",
                fix="convert them one by one",
                file=path,
            )
        names.add(name)
        numbered.append(replace(source, item=Item(name, index, problem)))
    return numbered


def _reject(what: str, fix: str) -> RejectedError:
    return RejectedError(what, fix=fix)


def _sources(
    name: str, parts: Sequence[ForeignTensor], said: dict[str, Any], how: Reading
) -> list[Source]:
    """Make one item of its tensors, or one for each entry of their batch dim."""
    for part in parts:
        if part.fault is not None:
            raise part.fault
    tensors = [_floats(t, how) for t in unpack(parts, how.packing, _reject)]
    shapes = _shapes(tensors)
    if {len(tensor.shape) for tensor in tensors} not in ({3}, {4}):
        raise _reject(
            f"shapes are {shapes}",
            "use [S, N, H], or [B, S, N, H] for B items; --qkv and --kv unpack, "
            "--heads cuts [S, N*H]",
        )
    batches = {tensor.shape[:-3] for tensor in tensors}
    if len(batches) > 1:
        raise _reject(f"batch dims disagree: {shapes}", "give all three the same")
    if len(parts) == 3 and parts[0] is parts[1] is parts[2] and 3 in parts[0].shape[:-1]:
        raise _reject(
            f"query, key and value are one tensor, {list(parts[0].shape)}, with a dim of 3",
            "name it with --qkv",
        )
    said = {**said, **_lists(said)}
    layout = _layout(tensors, said, how)
    problem = _problem(tensors, said, how, layout)
    sinks = _sinks(said["sinks"], problem.q_heads, how) if problem.sinks else None
    (batch,) = batches
    names = [batch_item_name(name, entry) for entry in range(batch[0])] if batch else [name]
    for one in names[-1:]:  # the longest
        if item_name_fault(one):
            raise _reject(f"its name {item_name_fault(one)}", "use patterns that give another name")
    entries: Sequence[int | None] = range(batch[0]) if batch else [None]
    return [
        Source(Item(one, 0, problem), layout, _reader(tensors, entry, layout), sinks)
        for one, entry in zip(names, entries, strict=True)
    ]


def _lists(said: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Read the segments, and the window where it is an array."""
    found = {}
    for name in ("segments", "window"):
        array = said.get(name)
        if not isinstance(array, ForeignTensor):
            continue
        if array.shape[0] > MAX_SEGMENTS:
            fix = f"pack at most {MAX_SEGMENTS} documents into one item"
            raise _reject(f"{array.shape[0]} {name}", fix)
        found[name] = tuple(map(int, array.fetch((slice(0, None),))))
    return found


def _sinks(array: ForeignTensor, heads: int, how: Reading) -> Array:
    """Read the sinks as float32."""
    if array.fault is not None:
        raise array.fault
    if array.shape != (heads,):
        raise _reject(f"its sinks are {list(array.shape)}", f"give [{heads}], one a query head")
    given = _floats(array, how).fetch((slice(0, None),))
    with np.errstate(over="ignore"):
        sinks = given.astype(np.float32)
    if np.any(np.isinf(sinks) & np.isfinite(given)):
        raise _reject("its sinks are too large for float32", "scale them down")
    return sinks


def _floats(tensor: ForeignTensor, how: Reading) -> ForeignTensor:
    """Integers become the floats whose bits they are, if the user says so."""
    name = tensor.dtype.newbyteorder("=").name
    if name not in BITS:
        return tensor
    if how.bits is None:
        raise _reject(
            f"holds {name}: maybe the bits of BF16 numbers",
            "if so, say --bits bf16; --bits fp16 for those of FP16",
        )
    return tensor.as_bits(NUMPY[how.bits])


def _layout(tensors: Sequence[ForeignTensor], said: dict[str, Any], how: Reading) -> Layout:
    """The order of tokens and heads: as was said, or as the shapes allow no other.

    Raises
    ------
    RejectedError
        It is a question: heads are as many as tokens, or more, and may be the tokens.

    """
    stated = how.layout or said.get("layout")
    if stated is not None:
        if stated not in LAYOUTS:
            raise _reject(f"layout is {stated!r}", f"use {' or '.join(LAYOUTS)}")
        return stated
    if how.packing.heads:
        return "token_major"  # heads were cut from the last dim
    possible = {layout: _possible(tensors, said, how, layout) for layout in LAYOUTS}
    token, head = possible["token_major"], possible["head_major"]
    if token is None and head is None:
        return "token_major"  # there is something else wrong, which will be said
    if token is not None:
        sides = ((token.q_heads, token.q_tokens), (token.kv_heads, token.kv_tokens))
        crowded = any(heads >= tokens and heads > 1 for heads, tokens in sides)
        if not (crowded if head is not None else token.kv_heads > token.kv_tokens):
            return "token_major"
    meanings = {name: found for name, found in possible.items() if found is not None}
    stacked = "; --qkv names a tensor that stacks all three" if 3 in tensors[0].shape[:-1] else ""
    raise _reject(
        f"is it {', or '.join(map(str, meanings.values()))}? (shapes {_shapes(tensors)})",
        " or ".join(f"say --layout {name} for {_short(p)}" for name, p in meanings.items())
        + stacked,
    )


def _short(problem: AttentionProblem) -> str:
    return f"{problem.q_tokens} tokens, {problem.q_heads} heads"


def _possible(
    tensors: Sequence[ForeignTensor], said: dict[str, Any], how: Reading, layout: Layout
) -> AttentionProblem | None:
    try:
        return _problem(tensors, said, how, layout)
    except RejectedError:
        return None


def _problem(
    tensors: Sequence[ForeignTensor], said: dict[str, Any], how: Reading, layout: Layout
) -> AttentionProblem:
    shapes = [
        (shape[1], shape[0], shape[2]) if layout == "head_major" else shape
        for shape in (tensor.shape[-3:] for tensor in tensors)
    ]
    scale = how.scale if how.scale is not None else said.get("scale")
    causal = how.causal or _mask(said.get("causal", "none"), same=shapes[0][0] == shapes[1][0])
    dtype = _dtype(tensors, how)
    try:
        masks: dict[str, Any] = {n: said[n] for n in ("window", "softcap", "segments") if n in said}
        masks["sinks"] = "sinks" in said
        return problem_of(shapes, dtype, causal, scale, **{**masks, **how.masks})
    except RejectedError as error:
        what = f"{error.what} (shapes {_shapes(tensors)})"
        raise _reject(what, f"{error.fix}; see --layout") from None


def _shapes(tensors: Sequence[ForeignTensor]) -> str:
    return ", ".join(f"{n} {list(t.shape)}" for n, t in zip(TENSORS, tensors, strict=True))


def _dtype(tensors: Sequence[ForeignTensor], how: Reading) -> DTypeName:
    found = sorted({tensor.dtype.newbyteorder("=").name for tensor in tensors})
    if how.dtype:
        return how.dtype
    if len(found) > 1:
        raise _reject(f"dtypes disagree: {', '.join(found)}", "choose --dtype bf16 or fp16")
    if found[0] not in get_args(DTypeName):
        raise _reject(f"its dtype is {found[0]}", "choose --dtype bf16 or fp16 to round to")
    name: DTypeName = found[0]
    return name


def _mask(said: Any, *, same: bool) -> str:
    """The causal mask that a file names; a yes is enough where both kinds are the same."""
    if str(said).lower() in ("false", "0", "0.0"):
        return "none"
    if str(said).lower() not in ("true", "1", "1.0"):
        return str(said)
    if not same:
        raise _reject(
            f"causal is {said}, and query and key differ in length",
            "say --causal or --causal-lower-right",
        )
    return "upper_left"


def _reader(
    tensors: Sequence[ForeignTensor], entry: int | None, layout: Layout
) -> Callable[[Tensor, Span], Array]:
    def read(tensor: Tensor, span: Span) -> Array:
        source = tensors[TENSORS.index(tensor)]
        everything = slice(0, None)
        index = (span.slice, everything, everything)
        if layout == "head_major":
            index = (everything, span.slice, everything)
        if entry is None:
            block = source.fetch(index)
        else:
            block = source.fetch((slice(entry, entry + 1), *index))[0]
        return block.swapaxes(0, 1) if layout == "head_major" else block

    return read
