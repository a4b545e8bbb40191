"""Rounding to BF16 and FP16, compared with exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mdattn_mpi.dataset.dtypes import round_once


class Format(NamedTuple):
    """A binary float: bits of its mantissa, the smallest and the largest exponent."""

    dtype: Any
    mantissa: int
    least: int
    most: int


FORMATS = {
    "bfloat16": Format(np.dtype(ml_dtypes.bfloat16), 7, -126, 127),
    "float16": Format(np.dtype(np.float16), 10, -14, 15),
}


def nearest(number: float, form: Format) -> float:
    """What IEEE 754 makes of a finite number: the nearest, ties to even."""
    if number == 0:
        return number
    exponent = max(math.frexp(number)[1] - 1, form.least)
    step = Fraction(2) ** (exponent - form.mantissa)
    rounded = round(Fraction(number) / step) * step  # Python's round takes ties to even
    largest = (2 - Fraction(2) ** -form.mantissa) * Fraction(2) ** form.most
    size = math.inf if abs(rounded) > largest else abs(float(rounded))
    return math.copysign(size, number)


def rounded(number: float, form: Format, source: Any = np.float64) -> float:
    with np.errstate(over="ignore"):
        return float(round_once(np.array([number]).astype(source), form.dtype)[0])


@st.composite
def near_ties(draw: st.DrawFn) -> float:
    """Numbers beside the middle between two neighbours of either format, subnormal ones too."""
    form = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    exponent = draw(st.integers(form.least - form.mantissa - 2, form.most))
    middle = draw(st.integers(0, 1 << form.mantissa)) + 0.5
    off = draw(st.sampled_from([0.0, 2.0**-30, -(2.0**-30), 2.0**-40, -(2.0**-40), 2.0**-17]))
    return math.ldexp((middle + off) * 2.0**-form.mantissa + 1, exponent) * draw(
        st.sampled_from([1, -1])
    )


@pytest.mark.parametrize("name", FORMATS)
@given(number=st.floats(allow_nan=False, allow_infinity=False) | near_ties())
@example(1 + 2.0**-8 + 2.0**-40)
@example(1 + 2.0**-8)
@example(1 + 3 * 2.0**-8)
@example(2.0**-134)
@example(2.0**-134 + 2.0**-170)
@example(3.3961775292304957e38)
@example(65520.0)
@example(65519.99999999999)
@example(1.7e308)
@example(-5e-324)
def test_float64_is_rounded_once(name: str, number: float) -> None:
    found, wanted = rounded(number, FORMATS[name]), nearest(number, FORMATS[name])
    assert (found, math.copysign(1, found)) == (wanted, math.copysign(1, wanted))


@pytest.mark.parametrize("source", [">f8", "<f4", ">f4", "<f2", ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
@given(number=st.floats(width=16, allow_nan=False, allow_infinity=False))
def test_other_sources(name: str, source: Any, number: float) -> None:
    given_number = float(np.array(number).astype(source))
    assert rounded(number, FORMATS[name], source) == nearest(given_number, FORMATS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays(name: str) -> None:
    numbers = np.array([np.inf, -np.inf, np.nan])
    found = round_once(numbers, FORMATS[name].dtype).astype(float)
    np.testing.assert_array_equal(found, numbers)


def test_the_way_through_float32_is_another() -> None:
    """The control: what this module is there for."""
    number = np.array([1 + 2.0**-8 + 2.0**-40])
    bfloat16 = FORMATS["bfloat16"].dtype
    assert float(number.astype(np.float32).astype(bfloat16)[0]) == 1.0
    assert float(round_once(number, bfloat16)[0]) == 1.0078125
