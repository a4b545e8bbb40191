"""The problem: what is refused, what follows from the shapes, what all ranks must share."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import seen_pairs
from mdattn_mpi.problem import AttentionProblem, Plan, Span, TensorSpec, digest_of
from tests.support.reference import problems, visible

GOOD = AttentionProblem(48, 64, 8, 2, 32, 16, "float16", "lower_right", 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_tokens": 0}, "q_tokens is 0"),
        ({"kv_tokens": -1}, "kv_tokens is -1"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"kv_heads": 3}, "8 query heads are no multiple of 3"),
        ({"head_dim": 257}, "head_dim is 257"),
        ({"v_head_dim": 0}, "v_head_dim is 0"),
        ({"dtype": "float32"}, "float32"),
        ({"causal": "right"}, "right"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": 0}, "scale is 0"),
        ({"scale": 3.41e38}, "scale is 3.41e"),
        ({"scale": 1e-46}, "scale is 1e-46"),
        ({"scale": "0.5x"}, "scale is '0.5x'"),
        ({"window": (3, 1)}, r"window is \(3, 1\) with causal lower_right"),
        ({"window": (-2, 0)}, r"window is \(-2, 0\)"),
        ({"window": 3}, "window is 3"),
        ({"window": (1.5, 0)}, r"window is \(1.5, 0\)"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"softcap": 1e39}, r"softcap is 1e\+39"),
        ({"segments": (0, 9)}, "segments with 48 query and 64 kv tokens"),
        ({"segments": (1, 9), "kv_tokens": 48}, "segments begin with 1"),
        ({"segments": (0, 9, 9), "kv_tokens": 48}, "9 comes after 9"),
        ({"segments": (0, 9, 48), "kv_tokens": 48}, "48 is none of 48 tokens"),
    ],
)
def test_what_no_backend_takes_is_refused_with_the_value_and_a_fix(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RejectedError, match=message) as caught:
        replace(GOOD, **changes)
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_the_default_scale_is_one_over_the_root_of_the_head_dim() -> None:
    assert AttentionProblem(1, 1, 1, 1, 64, 8).scale == 0.125


def test_every_positive_number_of_float32_is_a_scale() -> None:
    about = np.finfo(np.float32)
    for scale in (about.smallest_subnormal, about.tiny, np.float32(0.3), about.max, np.array(2)):
        found = replace(GOOD, scale=scale)
        assert type(found.scale) is float
        assert found.scale == scale
        assert found.digest == replace(GOOD, scale=float(scale)).digest


@given(q_rows=st.integers(0, 40), kv_rows=st.integers(0, 40), diagonal=st.integers(-50, 50))
def test_seen_pairs_counts_the_mask(q_rows: int, kv_rows: int, diagonal: int) -> None:
    i, j = np.ogrid[:q_rows, :kv_rows]
    assert seen_pairs(q_rows, kv_rows, diagonal) == int((j <= i + diagonal).sum())


@given(problem=problems())
def test_pairs_flops_and_bytes_follow_from_the_mask_and_the_shapes(
    problem: AttentionProblem,
) -> None:
    assert problem.pairs == visible(problem).sum()
    assert problem.flops == 2 * problem.pairs * problem.q_heads * (
        problem.head_dim + problem.v_head_dim
    )
    k = problem.kv_tokens * problem.kv_heads * problem.head_dim
    v = problem.kv_tokens * problem.kv_heads * problem.v_head_dim
    assert problem.kv_bytes == 2 * (k + v)
    assert problem.group_heads * problem.kv_heads == problem.q_heads


def test_every_field_changes_the_digest() -> None:
    other = {
        "q_tokens": 49, "kv_tokens": 65, "q_heads": 4, "kv_heads": 4, "head_dim": 31,
        "v_head_dim": 15, "dtype": "bfloat16", "causal": "upper_left", "scale": 0.25,
        "window": (7, 0), "softcap": 30.0, "sinks": True, "segments": (0, 9),
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(AttentionProblem)}
    good = replace(GOOD, kv_tokens=GOOD.q_tokens)
    digests = {replace(good, **{name: value}).digest for name, value in other.items()}
    assert len(digests | {good.digest}) == len(other) + 1
    assert all(0 <= digest < 2**63 for digest in digests)


def test_outputs_of_versions_without_windows_stay_resumable() -> None:
    assert GOOD.digest == 6260723395737620063  # as it was before there were windows
    assert set(GOOD.facts()) == {field.name for field in fields(AttentionProblem)[:9]}


def test_reasons_don_t_change_the_digest_of_a_plan() -> None:
    plan = Plan(GOOD, "ring", 4)
    assert plan.digest == replace(plan, reasons=("because",)).digest
    assert plan.digest != replace(plan, strategy="ulysses").digest
    assert plan.digest != replace(plan, problem=replace(GOOD, scale=0.25)).digest
    assert plan.facts()["kv_tokens"] == 64


def test_the_digest_stays_the_same_between_runs_and_versions() -> None:
    """It is stored in files: a change here makes every old output unresumable."""
    assert digest_of({"b": 1, "a": "x"}) == digest_of({"a": "x", "b": 1}) == 1834545938811803110


def test_words() -> None:
    assert str(GOOD) == (
        "48 query and 64 kv tokens, 8 query and 2 kv heads of 32 (value 16), float16, lower_right"
    )
    assert str(AttentionProblem(600, 600, 8, 8, 64, 64)) == "600 tokens, 8 heads of 64, bfloat16"
    assert len(Span(3, 7)) == 4
    assert list(range(10))[Span(3, 7).slice] == [3, 4, 5, 6]
    assert Span(3, 7).shift(2) == Span(5, 9)


def test_bytes_of_a_tensor() -> None:
    for dtype, itemsize in (("bfloat16", 2), ("float16", 2), ("float32", 4), ("float64", 8)):
        assert TensorSpec("x", (3, 5, 7), dtype).nbytes == 105 * itemsize
