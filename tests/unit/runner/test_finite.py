"""NaN and infinity are found wherever they are, and nothing else is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.errors import ItemError
from mdattn_mpi.problem import Span
from mdattn_mpi.runner.finite import BLOCK, check_finite, first_nonfinite

DTYPES = [ml_dtypes.bfloat16, np.float16]


@given(st.lists(st.integers(0, 0xFFFF), max_size=40), st.sampled_from(DTYPES))
def test_any_bit_pattern(bits: list[int], dtype: type) -> None:
    array = np.array(bits, np.uint16).view(dtype)
    bad = np.flatnonzero(~np.isfinite(array.astype(np.float64)))
    assert first_nonfinite(array) == (bad[0] if bad.size else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 6])
def test_at_the_ends_of_blocks(dtype: type, at: int) -> None:
    array = np.ones(2 * BLOCK + 7, dtype)
    assert first_nonfinite(array) is None
    array[at] = -np.inf
    assert first_nonfinite(array) == at


def test_the_message_names_the_token_of_the_sequence() -> None:
    q, k, v = (np.ones((5, 2, 3), np.float16) for _ in range(3))
    spans = ((Span(0, 2), Span(10, 13)), (Span(4, 9),), (Span(4, 9),))
    check_finite((q, k, v), spans, "in.h5", "item7")
    q[3, 1, 2] = np.nan
    with pytest.raises(ItemError, match="query holds nan at token 11, head 1, dim 2") as found:
        check_finite((q, k, v), spans, "in.h5", "item7")
    assert (found.value.item, found.value.file) == ("item7", "in.h5")
