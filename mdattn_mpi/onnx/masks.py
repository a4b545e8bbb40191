"""What the mask of an attention means, told by its values.

A mask that depends on lengths alone is computed, for more tokens than any number in its arithmetic,
and compared with the masks that attention knows. So a window of 64 isn't taken for no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.onnx.model import WINDOW, attribute_of, import_onnx, operator

BLOCKED = -1e4  # an additive mask blocks a key from here on; exporters write -inf or the lowest
FEWEST, MOST = 40, 1 << 12  # tokens of a mask that is looked at
BIG = 1 << 31  # what exporters write for "to the end"
LOOK_UPS = ("Gather", "GatherElements", "GatherND", "Slice")
FAR = 1 << 24  # a position that no sequence reaches


class Mask(NamedTuple):
    """How many keys before and after its own a query sees; None: all."""

    left: int | None = None
    right: int | None = None

    def __str__(self) -> str:
        """In words."""
        if self == CAUSAL:
            return "causal"
        if self == NONE:
            return "every key is seen"
        sides = zip((self.left, self.right), ("before", "after"), strict=True)
        return "a window of " + " and ".join(
            f"{'all' if side is None else side} keys {where}" for side, where in sides
        )


NONE, CAUSAL = Mask(), Mask(right=0)


def mask_from_values(values: Any, positions: Any = None) -> Mask | str:
    """Tell which mask an array is, ``[..., Sq, Skv]``, boolean or additive; or what it looks like.

    Queries may have one row for all. `positions` are those of the tokens (default: 0, 1, …).
    """
    array = np.asarray(values)
    if array.dtype == bool:
        seen = array
    else:
        seen = array == 0
        if not (seen | (array <= BLOCKED)).all():
            return "adds values of its own to the scores, such as a relative position bias"
    flat = seen.reshape(-1, *seen.shape[-2:])
    if (flat != flat[:1]).any():
        return "differs from head to head"
    seen = flat[0]
    if seen.all():
        return NONE
    rows, columns = seen.shape
    if rows != columns:
        return "blocks keys, and has another number of queries"
    numbers = np.arange(rows) if positions is None else np.asarray(positions)
    distance = numbers[:, None] - numbers  # keys before a query's own
    left, right = (int(side[seen].max(initial=0)) for side in (distance, -distance))
    if not (seen == ((distance <= left) & (-distance <= right))).all():
        return f"blocks {1 - seen.mean():.0%} of the pairs, neither causal nor by a window"
    far = int(distance.max())
    return Mask(None if left == far else left, None if right == far else right)


def numbers_in(
    nodes: Sequence[Any], values: Mapping[str, Any], is_stored: Callable[[str], bool]
) -> tuple[list[int], list[int]]:
    """Return the numbers in the arithmetic of some nodes, and the sizes of stored tables in it."""
    bounds, tables = [], []
    for node in nodes:
        for name in node.input:
            array = np.asarray(values.get(name, 0))
            if array.size == 1 and array.dtype.kind in "iuf":
                number = abs(float(array.reshape(())))
                if number < (BIG if array.dtype.kind in "iu" else -BLOCKED):
                    bounds.append(int(number))
        if operator(node) in LOOK_UPS and is_stored(node.input[0]):
            tables += [values[node.input[0]].shape[dim] for dim in _looked_up(node, values)]
    return bounds, tables


def _looked_up(node: Any, values: Mapping[str, Any]) -> Sequence[int]:
    """Return the dims of its first input along which a node looks up, or cuts."""
    dims = values[node.input[0]].ndim
    if operator(node) == "GatherND":
        return range(values[node.input[1]].shape[-1])
    if operator(node) == "Slice":
        given = list(node.input[3:4])
        axes = values[given[0]] if given and given[0] else range(len(values[node.input[1]]))
        return [int(dim) % dims for dim in axes]
    return [attribute_of(node, "axis", 0) % dims]


def sparse_positions(bounds: Sequence[int]) -> Any:
    """Choose positions, few and far apart, between which every bound shows."""
    found = {*range(8), FAR - 1, FAR}
    for bound in sorted(set(bounds)):
        found.update(range(max(0, bound - 1), bound + 3))
    return np.array(sorted(found), np.int64)


def set_mask(node: Any, mask: Mask) -> None:
    """Say with attributes what the fourth input said, and drop it."""
    onnx = import_onnx()
    del node.input[3:]
    wanted: dict[str, Any] = {}
    if mask == CAUSAL and operator(node) == "TRT_Attention":
        wanted["causal_kind"] = "upper_left"
    elif mask == CAUSAL:
        wanted["is_causal"] = 1
    elif mask != NONE:
        wanted[WINDOW] = [-1 if side is None else side for side in mask]
    gone = {*wanted, *(("is_causal", "causal_kind") if WINDOW in wanted else ())}
    kept = [each for each in node.attribute if each.name not in gone]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(onnx.helper.make_attribute(*each) for each in wanted.items())


def window_of(node: Any) -> tuple[int, int] | None:
    """Return the keys before and after its own that a query sees, -1 for all; None: no window."""
    found = attribute_of(node, WINDOW)
    return (int(found[0]), int(found[1])) if found else None


def narrowed(node: Any, mask: Mask) -> Mask:
    """Put a node's own window or causal attribute and its mask together."""
    if own := window_of(node):
        left, right = (
            min((side for side in sides if side is not None and side >= 0), default=None)
            for sides in zip(own, mask, strict=True)
        )
        return Mask(left, right)
    if attribute_of(node, "is_causal", 0) or attribute_of(node, "causal_kind", b"none") != b"none":
        return Mask(mask.left, 0)
    return mask
