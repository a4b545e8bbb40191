"""NaN and infinity are found wherever they are, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.dataset import Item, open_dataset
from mdattn_mpi.errors import ItemError
from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.runner import finite
from mdattn_mpi.runner.finite import BLOCK, check_finite, check_output, first_nonfinite, is_finite
from tests.support.finished import write_dataset
from tests.support.reference import random_inputs

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


ITEM = Item("item7", 0, AttentionProblem(10, 7, 2, 1, 4, 3, "float16", "lower_right"))
SPANS = (Span(1, 3), Span(8, 10))  # tokens 0 to 2 see no key


def shards() -> tuple[np.ndarray, np.ndarray]:
    """A right output and log-sum-exp of `SPANS`."""
    lse = np.ones((4, 2), np.float32)
    lse[:2] = -np.inf
    return np.ones((4, 2, 3), np.float16), lse


def check(out: np.ndarray, lse: np.ndarray | None, may_be: bool = False, on: str = "cuda") -> None:
    check_output(ITEM, SPANS, out, lse, backend=on, may_be_nonfinite=lambda: may_be)


def test_a_finite_output_passes_and_the_input_is_not_asked_for() -> None:
    def never() -> bool:
        raise AssertionError

    check_output(ITEM, SPANS, *shards(), backend="cuda", may_be_nonfinite=never)


@pytest.mark.parametrize(("on", "fix"), [("cuda", "-b cpu"), ("cpu", "report")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_fails_its_item(value: float, on: str, fix: str) -> None:
    out, lse = shards()
    out[3, 1, 2] = value
    with pytest.raises(ItemError, match=f"{value} at token 9, head 1, dim 2") as found:
        check(out, lse, on=on)
    assert fix in found.value.fix
    assert found.value.item == "item7"
    check(out, lse, may_be=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_log_sum_exp_beyond_float32_fails_its_item(value: float) -> None:
    out, lse = shards()
    lse[2, 1] = value
    with pytest.raises(ItemError, match=f"token 8, head 1 is {value}") as found:
        check(out, lse)
    assert "--lse" in found.value.fix
    check(out, lse, may_be=True)
    check(out, None)


def test_a_row_that_sees_no_key_has_minus_infinity_and_nothing_else() -> None:
    out, lse = shards()
    lse[1, 0] = np.inf
    with pytest.raises(ItemError, match="token 2, head 0"):
        check(out, lse)


@pytest.mark.parametrize("tensor", range(3))
def test_a_whole_item_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: int
) -> None:
    monkeypatch.setattr(finite, "READ_TOKENS", 3)
    arrays = random_inputs(ITEM.problem, 5)
    bad = tuple(array.copy() for array in arrays)
    bad[tensor][-1, 0, 1] = np.inf
    write_dataset(tmp_path / "in.h5", {"bad": (ITEM.problem, bad), "good": (ITEM.problem, arrays)})
    with open_dataset(tmp_path / "in.h5") as dataset:
        assert [is_finite(dataset, item) for item in dataset.items] == [False, True]
