"""The two file formats, on one page: names, attributes, encodings, versions.

Both are plain HDF5 files. ``docs/file-format.md`` says the same in words, with a reader in ten
lines.

Dataset (input)::

    /                     format = "mdattn-dataset", version = 1
    /items/<name>/query   [Sq, Nq, H]     attributes of the item, all optional: causal, scale,
    /items/<name>/key     [Skv, Nkv, H]   window, softcap, layout, crc32 (of the bytes of each
    /items/<name>/value   [Skv, Nkv, Hv]  dataset that there is, in this order)
    /items/<name>/sinks   [Nq]            float32, optional: a score a head without a value
    /items/<name>/segments  [documents]   int64, optional: the first token of each document

With a leading batch dim, ``[B, S, N, H]``, the item stands for B items ``<name>.0``, ``<name>.1``
and so on. With ``layout = "head_major"`` (of the item, or of the file) tensors are ``[N, S, H]``.

Dataset of token ids, for a model::

    /items/<name>/input_ids  [S]          uint16, uint32, int32 or int64; attribute of the item:
                                          crc32 (of the bytes of the one or two below it)
    /items/<name>/segments   [documents]  int64, optional: the first token of each document
    /items/<name>/names      [documents]  text, optional, for people: what each is called

Output of attention::

    /                     format = "mdattn-output", version = 1, and provenance
    /items/<name>/output  [Sq, Nq, Hv]    attributes of the item: index, problem (JSON)
    /items/<name>/lse     [Sq, Nq]        float32, optional
    /ledger/state         [items]         uint8: 0 todo, 1 done, 2 failed
    /ledger/crc32         [items, width]  uint32: of each rank's shard, output spans then LSE spans
    /ledger/spans         [items, width, runs, 2]  uint64: each rank's tokens, as runs of start
                                          and stop; an empty one is Sq, Sq
    /ledger/ranks         [items]         uint32: how many ranks made the item
    /ledger/strategy      [items]         uint8: how they shared it, a position in STRATEGIES
    /ledger/reason        [items]         256 bytes: why it failed, UTF-8, zero-padded

Output of a model's engine: the same, but for what an item holds::

    /items/<name>/<tensor>  any shape and dtype; attributes of the item: index, tensors (JSON: the
                            tokens, and of each tensor shape, dtype and token_dim)

Row ``i`` of the ledger belongs to the item whose attribute ``index`` is ``i``. Every dataset of an
output is contiguous, so that ranks write at known offsets and HDF5's metadata never changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, ModelProblem

Layout = Literal["token_major", "head_major"]
Tensor = Literal["query", "key", "value"]
Encoding = Literal["float", "uint16", "opaque"]
State = Literal["todo", "done", "failed"]

DATASET_FORMAT = "mdattn-dataset"
OUTPUT_FORMAT = "mdattn-output"
VERSION = 1

ITEMS = "items"
LEDGER = "ledger"
TENSORS: tuple[Tensor, ...] = ("query", "key", "value")
TOKEN_DTYPES = {"input_ids": ("uint16", "uint32", "int32", "int64"), "segments": ("int64",)}
BESIDE = {"sinks": "float32", "segments": "int64"}  # datasets of an item that it may have
ITEM_ATTRIBUTES = ("causal", "scale", "window", "softcap", "layout", "crc32")
TENSOR_ATTRIBUTES = ("dtype",)
LAYOUTS: tuple[Layout, ...] = ("token_major", "head_major")
STATES: tuple[State, ...] = ("todo", "done", "failed")  # the position is the byte in the ledger
# The position is the byte in the ledger.
STRATEGIES = ("ring", "allgather", "ulysses", "hierarchical")
REASON_BYTES = 256
MIN_LEDGER_WIDTH = 64  # room for a resume with more ranks

# What a file can make us do, at most. An honest file is far from all of these.
MAX_ITEMS = 100_000
MAX_NAME = 200
MAX_ATTRIBUTE_BYTES = 1 << 20
MAX_LINK_DEPTH = 16
MAX_CHUNK_BYTES = 1 << 30
MAX_COMPRESSION = 1100  # deflate can't do better than 1032
MAX_NODES = 100_000  # objects that a foreign file may hold for `mdattn convert`


@dataclass(frozen=True)
class Item:
    """One unit of work: a name, its position in the file, and what is to be computed."""

    name: str
    index: int
    problem: AttentionProblem


@dataclass(frozen=True)
class ModelItem:
    """The same for a model's engine."""

    name: str
    index: int
    problem: ModelProblem


AnyItem = Item | ModelItem


def problem_of(
    shapes: Sequence[tuple[int, ...]], dtype: str, causal: str, scale: float | None, **masks: Any
) -> AttentionProblem:
    """Make a problem of the token-major shapes of query, key and value, and other fields of it.

    Raises
    ------
    RejectedError
        They don't fit one another, or no backend can take them.

    """
    (q, n, h), (s, m, g), (t, o, v) = shapes
    if (s, m) != (t, o):
        raise RejectedError("key and value disagree", fix="give both the same tokens and heads")
    if h != g:
        raise RejectedError(
            f"head dims disagree: query {h}, key {g}", fix="give query and key the same head dim"
        )
    return AttentionProblem(q, s, n, m, h, v, dtype, causal, scale, **masks)  # type: ignore[arg-type]


def item_name_fault(name: str) -> str:
    """Say what is wrong with `name` as the name of an item; empty when nothing is.

    Names become attributes, log lines and arguments, never paths; still none may look like one.
    """
    if not 1 <= len(name) <= MAX_NAME:
        return f"has {len(name)} characters; 1 to {MAX_NAME} are allowed"
    if not name.isprintable():
        return "contains control characters or bytes that are not UTF-8"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "looks like a path"
    if "," in name or name != name.strip():
        return "contains a comma or begins or ends with a space, so no pattern could select it"
    return ""


def natural_order(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """A sort key under which ``item2`` comes before ``item10``."""
    key = []
    for run in re.findall(r"[0-9]+|[^0-9]+", name):
        digits = run.lstrip("0") if run[0] in "0123456789" else ""
        text = run[0] not in "0123456789"
        key.append((text, len(digits), run if text else digits))
    return key, name


def batch_item_name(name: str, position: int) -> str:
    """The name of one entry of a batch dim: no slash, and nothing that a pattern would expand."""
    return f"{name}.{position}"


def shown(name: str) -> str:
    """`name` as it may appear on a terminal: without control characters, not too long."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= MAX_NAME else text[:MAX_NAME] + "…"
