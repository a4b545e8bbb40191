"""Which tensors of a foreign file make an item: by names with stars."""

from __future__ import annotations

import re
from pathlib import Path

from mdattn_mpi.dataset.foreign.tensor import ForeignFile
from mdattn_mpi.dataset.layout import natural_order, shown
from mdattn_mpi.errors import RejectedError

Names = tuple[str, ...]  # query, key, value; or query and packed key-value; or one that has all

OURS: Names = ("items/*/query", "items/*/key", "items/*/value")
USUAL: list[Names] = [
    tuple(prefix + name for name in names)
    for names in (
        *(("query", "key", "value"), ("q", "k", "v"), ("Q", "K", "V")),
        *(("query", "kv"), ("q", "kv"), ("qkv",), ("QKV",)),
    )
    for prefix in ("", "*/", "*.", "*_", "items/*/")
]
LISTED = 8  # tensors that a refusal names


def match_names(file: ForeignFile, given: Names | None, path: str) -> dict[str, Names]:
    """Give every item the names of its tensors; `given` are patterns, or None for the usual ones.

    Raises
    ------
    RejectedError
        Nothing matches, an item lacks a tensor, or two would have the same name.

    """
    tensors = file.tensors
    stem = re.sub(r"[^\w.-]", "_", Path(path).stem) or "item"
    for patterns in USUAL if given is None else [tuple(name.lstrip("/") for name in given)]:
        found: dict[str, Names] = {}
        for name in sorted(tensors, key=natural_order):
            pieces = _pieces(name, patterns[0])
            if pieces is None:
                continue
            item = ".".join(pieces) or stem
            if item in found:
                raise RejectedError(
                    f"{shown(found[item][0])} and {shown(name)} would both be item {shown(item)}",
                    fix="use patterns with fewer stars, and convert in several steps",
                    file=path,
                )
            found[item] = tuple(_fill(pattern, pieces) for pattern in patterns)
        missing = [name for names in found.values() for name in names if name not in tensors]
        if found and not missing:
            return found
        if given is not None and missing:
            raise RejectedError(
                f"holds no tensor {shown(missing[0])!r}; it holds {_listed(file)}",
                fix="correct the patterns, or the file",
                file=path,
            )
    raise RejectedError(
        f"no tensor matches; it holds {_listed(file)}",
        fix="name them with --query, --key and --value; with --qkv, or --query and --kv, where "
        "one tensor holds several",
        file=path,
    )


def _listed(file: ForeignFile) -> str:
    """The tensors with their shapes, and what can't be one."""
    listed = [f"{shown(name)} {list(tensor.shape)}" for name, tensor in file.tensors.items()]
    listed += [f"{shown(name)} (no array of floats)" for name in file.others]
    return ", ".join(listed[:LISTED]) + " …" * (len(listed) > LISTED) or "nothing"


def _pieces(name: str, pattern: str) -> list[str] | None:
    """What the stars of `pattern` stand for in `name`; None when it doesn't match."""
    expression = "([^/]+)".join(re.escape(part) for part in pattern.split("*"))
    match = re.fullmatch(expression, name)
    return list(match.groups()) if match else None


def _fill(pattern: str, pieces: list[str]) -> str:
    parts = pattern.split("*")
    return "".join(a + b for a, b in zip(parts, [*pieces, ""], strict=False))
