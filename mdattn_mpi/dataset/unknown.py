"""What a file holds besides what the format knows: it may change what is to be computed.

A window, a softcap or segments that nobody looked at would give the result of another problem. So
they are refused by name, unless the user says that they don't matter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from mdattn_mpi.dataset.hdf5 import Node
from mdattn_mpi.dataset.layout import ITEM_ATTRIBUTES, TENSOR_ATTRIBUTES, shown
from mdattn_mpi.errors import RejectedError

# Written by libraries of their own accord, or text for people: nothing that attention could obey.
HARMLESS = frozenset(
    (
        *("CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS"),  # HDF5
        *("TITLE", "VERSION", "FLAVOR", "FILTERS", "EXTDIM", "PYTABLES_FORMAT_VERSION"),  # PyTables
        *("_NCProperties", "_Netcdf4Coordinates", "_Netcdf4Dimid", "_nc3_strict"),  # netCDF
        *("title", "name", "long_name", "description", "comment", "units", "history", "source"),
        *("author", "creator", "created", "date"),
    )
)
# On the file or on /items they look like defaults for all items, which the format doesn't have.
OF_ITEMS_ONLY = ("causal", "scale", "window", "softcap", "sinks", "segments", "mask", "bias")


def unknown_in(group: Node, tensors: Collection[str]) -> Iterator[tuple[str, str]]:
    """List the name and the description of everything in an item that the format doesn't know.

    `tensors` are the names of its query, key and value.
    """
    for name in group.attribute_names():
        if name not in HARMLESS and name not in ITEM_ATTRIBUTES:
            yield name, f"attribute {shown(name)}"
    for name in group.names():
        if name not in tensors:
            if not _is_dimension_scale(group, name):
                yield name, f"dataset {shown(name)}"
            continue
        tensor = group.child(name)
        for attribute in tensor.attribute_names() if tensor else ():
            if attribute not in HARMLESS and attribute not in TENSOR_ATTRIBUTES:
                yield attribute, f"attribute {shown(attribute)} of {shown(name)}"


def _is_dimension_scale(group: Node, name: str) -> bool:
    """Whether a dataset only names the steps along a dim of others. See H5DSset_scale."""
    try:
        child = group.child(name)
        return child is not None and child.attribute("CLASS") == "DIMENSION_SCALE"
    except RejectedError:
        return False


def misplaced_in(group: Node) -> Iterator[tuple[str, str]]:
    """List what a file, or a group of several items, says as if it were said of each item."""
    for name in group.attribute_names():
        if name in OF_ITEMS_ONLY:
            yield name, f"attribute {name}, which only counts on an item"
    for name in group.names():
        if name in OF_ITEMS_ONLY and (child := group.child(name)) and child.is_dataset:
            yield name, f"dataset {name}, which only counts in an item"


def refuse_unknown(found: Iterable[tuple[str, str]], ignore: Collection[str], file: str) -> None:
    """Refuse what was found, except for the names in `ignore`.

    Raises
    ------
    RejectedError
        Something is left; names all of it.

    """
    left = {name: what for name, what in found if name not in ignore}
    if left:
        raise RejectedError(
            f"has {', '.join(left.values())}: the result would be computed without that",
            fix=f"if that is right, say --ignore {','.join(map(shown, left))}; "
            "docs/file-format.md has what is known",
            file=file,
        )
