"""The blocked reference against attention written out."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.verifier.reference import MAX_BLOCK, reference
from tests.support.reference import attention, problems, random_inputs


def attend(problem, rows, q, k, v, *sinks):
    tensor = {"key": k, "value": v}
    return reference(problem, rows, q[rows], lambda name, span: tensor[name][span.slice], *sinks)


@given(problem=problems(max_tokens=90), seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=80, deadline=None)
def test_equals_dense_attention(problem, seed, data):
    inputs = random_inputs(problem, seed)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, problem.q_tokens - 1), min_size=1))))
    output, lse = attention(problem, *inputs)
    found = attend(problem, rows, *inputs)
    np.testing.assert_allclose(found.output, output[rows], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found.lse, lse[rows], rtol=1e-12, atol=1e-12)
    assert found.finite.all()


def test_measures_what_was_summed():
    """Four equal weights; the values 3, -1, 1, 1 in this order, in blocks of one key."""
    problem = AttentionProblem(1, 4, 1, 1, 2, 1)
    q, k = np.zeros((1, 1, 2), np.float16), np.ones((4, 1, 2), np.float16)
    v = np.array([3, -1, 1, 1], np.float16).reshape(4, 1, 1)
    found = attend(problem, np.array([0]), q, k, v)
    assert found.output.item() == pytest.approx(4 / 4)
    assert found.spread.item() == pytest.approx(np.sqrt(9 + 1 + 1 + 1) / 4)
    assert found.peak.item() == pytest.approx(4 / 4)
    assert attend(problem, np.array([0]), q, k, -v[::-1]).peak.item() == pytest.approx(4 / 4)
    cancelled = np.array([3, 3, -3, -3], np.float16).reshape(4, 1, 1)
    assert attend(problem, np.array([0]), q, k, cancelled).peak.item() == pytest.approx(6 / 4)


def test_reads_each_key_once_in_small_blocks_and_none_that_is_not_seen():
    problem = AttentionProblem(4000, 40_000, 2, 1, 8, 4, causal="upper_left")
    _, k, v = random_inputs(AttentionProblem(1, 40_000, 2, 1, 8, 4), 1)
    q = np.ones((1, 2, 8), ml_dtypes.bfloat16)
    spans = {"key": [], "value": []}

    def read(name, span):
        spans[name].append(span)
        return {"key": k, "value": v}[name][span.slice]

    reference(problem, np.array([3999]), q, read)
    for found in spans.values():
        assert [t for span in found for t in range(span.start, span.stop)] == list(range(4000))
        assert max(map(len, found)) <= MAX_BLOCK


def test_large_scores_neither_overflow_nor_vanish():
    problem = AttentionProblem(2, 50, 1, 1, 4, 4, dtype="float16", scale=1000.0)
    q, k, v = random_inputs(problem, 5)
    found = attend(problem, np.array([0, 1]), q, k, v)
    best = (k[:, 0].astype(float) @ q[:, 0].astype(float).T).argmax(axis=0)
    np.testing.assert_allclose(found.output[:, 0], v[best, 0].astype(float), rtol=1e-3)
    assert (abs(found.lse) <= found.score_bound + np.log(50)).all()


@pytest.mark.parametrize("tensor", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_marks_rows_that_see_what_is_not_finite_and_no_others(tensor, bad):
    problem = AttentionProblem(60, 60, 2, 2, 4, 4, causal="upper_left")
    q, k, v = random_inputs(problem, 6)
    clean = attend(problem, np.arange(60), q, k, v)
    {"query": q, "key": k, "value": v}[tensor][33, 1, 2] = bad
    found = attend(problem, np.arange(60), q, k, v)

    expected = np.ones((60, 2), bool)
    expected[33 : 34 if tensor == "query" else None, 1] = False
    np.testing.assert_array_equal(found.finite, expected)
    np.testing.assert_array_equal(found.output[expected], clean.output[expected])
    assert np.isfinite(found.output).all()
