"""What a tensor that depends on lengths alone may be, told by its values at several lengths.

A form says which values a tensor has at any length, so that it can be looked at again at lengths
beyond every number in the arithmetic behind it: what begins at 512 tokens isn't seen at 40.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Lengths = Mapping[str, int]  # of each sequence


@dataclass(frozen=True)
class Constant:
    """The same at all lengths."""

    value: Any

    def at(self, lengths: Lengths) -> Any:
        """Return the values at some lengths."""
        return self.value


@dataclass(frozen=True)
class Count:
    """``factor · tokens + rest`` of a sequence, each element by itself: a shape, as a rule."""

    sequence: str
    factor: Any
    rest: Any

    def at(self, lengths: Lengths) -> Any:
        """Return the values at some lengths."""
        return self.factor * lengths[self.sequence] + self.rest


@dataclass(frozen=True)
class Spread:
    """One row for every token, which are along `dim`."""

    sequence: str
    dim: int
    row: Any

    def at(self, lengths: Lengths) -> Any:
        """Return the values at some lengths."""
        return np.repeat(self.row, lengths[self.sequence], self.dim)


@dataclass(frozen=True)
class Numbers:
    """The tokens, along `dim`, numbered from `start`."""

    sequence: str
    dim: int
    start: Any  # its dtype is the tensor's
    shape: tuple[int, ...]  # with -1 for the tokens

    def at(self, lengths: Lengths) -> Any:
        """Return the values at some lengths."""
        numbers = np.arange(lengths[self.sequence]) + self.start
        return numbers.astype(self.start.dtype).reshape(self.shape)


Form = Constant | Count | Spread | Numbers


def has_form(form: Form, values: Any, lengths: Lengths) -> bool:
    """Whether `values`, computed at those lengths, are what a form says."""
    expected = np.asarray(form.at(lengths))
    if values is None or expected.shape != values.shape:
        return False
    return bool(np.array_equal(expected, values, equal_nan=values.dtype.kind == "f"))


def form_of(
    values: Sequence[Any], lengths: Sequence[Lengths], along: tuple[str, int] | None
) -> Form | None:
    """Find the form of a tensor, given its values at several lengths; None where it has none.

    `along` is the sequence that one of its dims follows, and that dim.
    """
    found: list[Form] = [Constant(values[0])]
    if along:
        sequence, dim = along
        row = np.take(values[0], [0], dim)
        found = [Spread(sequence, dim, row)]
        if row.size == 1 and row.dtype.kind in "iuf":
            shape = tuple(-1 if n == dim else 1 for n in range(row.ndim))
            found.append(Numbers(sequence, dim, row.reshape(-1)[0], shape))
    elif len({each.shape for each in values}) == 1 and values[0].dtype.kind in "iu":
        for sequence in lengths[0]:
            first, second = (each[sequence] for each in lengths[:2])
            factor = (values[1] - values[0]) // (second - first)
            found.append(Count(sequence, factor, values[0] - factor * first))
    for form in found:
        if all(has_form(form, *each) for each in zip(values, lengths, strict=True)):
            return form
    return None
