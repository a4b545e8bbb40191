"""What a foreign file says about its items besides q, k, v: mask, scale, layout, sinks."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

from mdattn_mpi.dataset.foreign.tensor import ForeignFile, ForeignTensor
from mdattn_mpi.dataset.hdf5 import Node
from mdattn_mpi.dataset.layout import ITEM_ATTRIBUTES, shown
from mdattn_mpi.dataset.unknown import (
    HARMLESS,
    OF_ITEMS_ONLY,
    misplaced_in,
    refuse_unknown,
    unknown_in,
)

OPTIONS = ("causal", "scale", "softcap", "layout")
Found = Iterator[tuple[str, str]]


class Surroundings:
    """What lies beside the tensors of items.

    In HDF5 it is about an item if it is in the group that holds the tensors, mostly as attributes;
    elsewhere if its name begins alike: ``l.0.scale`` belongs to ``l.0.q``. `matched` are the
    tensors of all items, `ignore` the names that don't matter.
    """

    def __init__(
        self, file: ForeignFile, path: str, matched: Collection[str], ignore: Collection[str]
    ) -> None:
        self._file = file
        self._path = path
        self._matched = matched
        self._ignore = ignore
        self._names = sorted({*file.tensors, *file.lists, *file.others})
        self._tensors: dict[str, set[str]] = defaultdict(set)  # of items, by group
        for name in matched:
            self._tensors[os.path.dirname(name)].add(os.path.basename(name))
        if not file.groups:
            refuse_unknown(self._misplaced(), ignore, path)

    def options(self, names: Sequence[str]) -> dict[str, Any]:
        """Say mask, scale, layout of the item that has these tensors, as far as known.

        Sinks, segments, and a window that isn't an attribute, are arrays that are still to be read.

        Raises
        ------
        RejectedError
            The file says something else of it, too, that a dataset can't say.

        """
        if not self._file.groups:
            prefix = _prefix(names)
            arrays = self._arrays(prefix)
            refuse_unknown(self._unknown_beside(prefix, arrays), self._ignore, self._path)
            found = {name: self._file.others.get(prefix + name) for name in ("window", *OPTIONS)}
            said: dict[str, Any] = {**found, **arrays}
        else:
            folders = sorted({os.path.dirname(name) for name in names})
            own = self._file.groups[folders[0]] if len(folders) == 1 else None
            arrays = self._arrays(f"{folders[0]}/".lstrip("/")) if own else {}
            arrays.pop("window", None)  # an attribute, here
            refuse_unknown(self._unknown_around(folders, arrays), self._ignore, self._path)
            said = {name: own.attribute(name) for name in OPTIONS} if own else {}
            said |= arrays
            if own and "window" in own.attribute_names():
                said["window"] = own.numbers("window", 2) or "not two integers"
            said["layout"] = self._layout(folders[0])
        return {name: value for name, value in said.items() if value is not None}

    def _arrays(self, prefix: str) -> dict[str, ForeignTensor]:
        """Find sinks and segments beside an item's tensors, and a window of two integers."""
        file, ignored = self._file, self._ignore
        found = {
            "sinks": file.tensors.get(prefix + "sinks"),
            "segments": file.lists.get(prefix + "segments"),
            "window": file.lists.get(prefix + "window"),
        }
        if found["window"] and found["window"].shape != (2,):
            del found["window"]
        return {name: array for name, array in found.items() if array and name not in ignored}

    def _unknown_around(self, folders: Sequence[str], arrays: Collection[str]) -> Found:
        """In HDF5: in the item's group, or in the three; and what groups above say."""
        for folder in folders:
            yield from unknown_in(self._file.groups[folder], {*self._tensors[folder], *arrays})
            above = _above(folder) if len(folders) == 1 else [folder, *_above(folder)]
            for group in above:
                yield from misplaced_in(self._file.groups[group])

    def _layout(self, folder: str) -> Any:
        """A group's layout, or that of the next one above it that has one."""
        groups: list[Node] = [self._file.groups[path] for path in (folder, *_above(folder))]
        found = (group.attribute("layout") for group in groups)
        return next((layout for layout in found if layout is not None), None)

    def _unknown_beside(self, prefix: str, arrays: Collection[str]) -> Found:
        """Elsewhere: what begins alike, and is on no deeper level."""
        start = bisect_left(self._names, prefix)
        for name in takewhile(lambda n: n.startswith(prefix), self._names[start:]):
            rest = name.removeprefix(prefix)
            option = rest in ITEM_ATTRIBUTES and self._file.others.get(name) is not None
            known = name in self._matched or rest in HARMLESS or rest in arrays or option
            if not known and not {"/", "."} & set(rest):
                yield rest, f"array or value {shown(rest)}"

    def _misplaced(self) -> Found:
        """Elsewhere: what speaks of items, but belongs to none."""
        prefixes = {_prefix((name,)) for name in self._matched}
        for name in self._names:
            prefix = _prefix((name,))
            rest = name.removeprefix(prefix)
            if rest in OF_ITEMS_ONLY and prefix not in prefixes:
                yield (
                    rest,
                    f"array or value {shown(name)}, which only counts beside an item's tensors",
                )


def _above(folder: str) -> list[str]:
    """The paths of the groups that hold `folder`, from the inside out."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in reversed(range(len(parts)))]


def _prefix(names: Sequence[str]) -> str:
    """What the names of an item's tensors begin with, up to the last slash, dot or underscore."""
    first = names[0]
    for separators in "/.", "_":
        stop = max(first.rfind(mark) for mark in separators) + 1
        if stop and all(name.startswith(first[:stop]) for name in names):
            return first[:stop]
    return ""
