"""Pairs of a band, counted one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.mask import Band

BOUND = st.none() | st.integers(0, 12)


@given(before=BOUND, after=BOUND, rows=st.integers(1, 12), keys=st.integers(1, 12))
def test_pairs_of_a_band(before: int | None, after: int | None, rows: int, keys: int) -> None:
    seen = 0
    for row in range(rows):
        for key in range(keys):
            right = key - row - (keys - rows)  # of the diagonal
            seen += (after is None or right <= after) and (before is None or -right <= before)
    assert Band(before, after).pairs(rows, keys) == seen
