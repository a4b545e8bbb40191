"""What a foreign file says about an item besides its tensors: mask, scale, layout, and the rest."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from mdattn_mpi.dataset.foreign.tensor import ForeignFile
from mdattn_mpi.dataset.hdf5 import Node
from mdattn_mpi.dataset.layout import ITEM_ATTRIBUTES, shown
from mdattn_mpi.dataset.unknown import (
    HARMLESS,
    OF_ITEMS_ONLY,
    misplaced_in,
    refuse_unknown,
    unknown_in,
)

OPTIONS = ("causal", "scale", "layout")
Found = Iterator[tuple[str, str]]


def said_of(
    file: ForeignFile,
    names: Sequence[str],
    matched: Collection[str],
    ignore: Collection[str],
    path: str,
) -> dict[str, Any]:
    """Collect causal, scale and layout, as far as the file has them, of one item.

    In HDF5 these are attributes of the group that holds the tensors; elsewhere numbers and text
    that are named like them: ``l.0.scale`` belongs to ``l.0.q``.

    Parameters
    ----------
    file, path
        The file, and its name for messages.
    names
        The item's tensors.
    matched
        The tensors of all items.
    ignore
        Names that don't matter.

    Raises
    ------
    RejectedError
        The file says something else, too, that a dataset can't say.

    """
    if not file.groups:
        prefix = _prefix(names)
        refuse_unknown(_unknown_beside(file, prefix, matched), ignore, path)
        said = {name: file.others.get(prefix + name) for name in OPTIONS}
    else:
        folders = sorted({os.path.dirname(name) for name in names})
        refuse_unknown(_unknown_around(file, folders, matched), ignore, path)
        own = file.groups[folders[0]] if len(folders) == 1 else None
        said = {name: own.attribute(name) for name in OPTIONS} if own else {}
        said["layout"] = _layout_of(file, folders[0])
    return {name: value for name, value in said.items() if value is not None}


def _unknown_around(file: ForeignFile, folders: Sequence[str], matched: Collection[str]) -> Found:
    """In HDF5: in the item's group, or in the three; and what groups above say."""
    for folder in folders:
        yield from unknown_in(
            file.groups[folder],
            {os.path.basename(name) for name in matched if os.path.dirname(name) == folder},
        )
        above = _above(folder) if len(folders) == 1 else [folder, *_above(folder)]
        for group in above:
            yield from misplaced_in(file.groups[group])


def _above(folder: str) -> list[str]:
    """The paths of the groups that hold `folder`, from the inside out."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in reversed(range(len(parts)))]


def _layout_of(file: ForeignFile, folder: str) -> Any:
    """A group's layout, or that of the next one above it that has one."""
    groups: list[Node] = [file.groups[path] for path in (folder, *_above(folder))]
    found = (group.attribute("layout") for group in groups)
    return next((layout for layout in found if layout is not None), None)


def _prefix(names: Sequence[str]) -> str:
    """What the names of an item's tensors begin with, up to the last slash, dot or underscore."""
    first = names[0]
    for separator in "/.", "_":
        stop = max(first.rfind(mark) for mark in separator) + 1
        if stop and all(name.startswith(first[:stop]) for name in names):
            return first[:stop]
    return ""


def _unknown_beside(file: ForeignFile, prefix: str, matched: Collection[str]) -> Found:
    """Elsewhere: names with the same prefix, and those without any that speak of items."""
    for name in (*file.tensors, *file.others):
        rest = name.removeprefix(prefix)
        beside = name.startswith(prefix) and not {"/", "."} & set(rest)
        if beside and name not in matched and rest not in HARMLESS and rest not in ITEM_ATTRIBUTES:
            yield rest, f"array or value {shown(rest)}"
        elif prefix and name in OF_ITEMS_ONLY:
            yield name, f"value {name}, which only counts beside an item's tensors"
