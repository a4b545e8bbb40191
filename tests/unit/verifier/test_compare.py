"""Which rows are looked at, and what a judgement says about them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.verifier import compare
from mdattn_mpi.verifier.compare import Place, Source, choose_rows, judge, runs
from mdattn_mpi.verifier.tolerance import HOST
from tests.support.group import take
from tests.support.reference import DTYPES, attention, problems, random_inputs


@given(problem=problems(), data=st.data())
def test_chosen_rows_are_the_telling_ones_and_some_more(problem, data):
    length = problem.q_tokens
    borders = data.draw(st.lists(st.integers(-5, length + 5), max_size=4))
    count = data.draw(st.integers(0, 20))
    chosen = choose_rows(problem, borders, count, (1, 2))
    assert (np.diff(chosen) > 0).all()
    assert {0, length - 1} <= set(chosen) <= set(range(length))
    for border in borders:
        assert {border - 1, border} & set(range(length)) <= set(chosen)
    assert len(chosen) >= min(count, length)
    assert len(chosen) <= count + 6 + 2 * (len(borders) + len(problem.segments))


def test_another_seed_chooses_other_rows_and_the_same_seed_the_same():
    problem = AttentionProblem(10_000, 10_000, 1, 1, 8, 8)
    first, again, other = (set(choose_rows(problem, (), 64, seed)) for seed in ((1,), (1,), (2,)))
    assert first == again
    assert len(first & other) < 16


def test_the_first_row_that_sees_a_key_is_among_them():
    problem = AttentionProblem(10_000, 4000, 1, 1, 8, 8, causal="lower_right")
    assert {5999, 6000} <= set(choose_rows(problem, (), 0, (0,)))


@given(st.sets(st.integers(0, 60), min_size=1))
def test_runs_cover_the_rows(rows):
    ascending = np.array(sorted(rows))
    found = list(runs(ascending))
    assert [row for span in found for row in range(span.start, span.stop)] == ascending.tolist()
    assert all(a.stop < b.start for a, b in pairwise(found))


def source_of(problem, seed, lse=True):
    """Inputs and a right output, and where to change it."""
    q, k, v = random_inputs(problem, seed)
    out, sums = attention(problem, q, k, v)
    arrays = {
        "query": q,
        "key": k,
        "value": v,
        "output": out.astype(DTYPES[problem.dtype]),
        "lse": sums.astype(np.float32),
    }

    def read(name, spans):
        return take(arrays[name], spans)

    return Source(problem, read, read, lse), arrays


PROBLEM = AttentionProblem(90, 70, 4, 2, 16, 24, causal="lower_right")


@pytest.mark.parametrize("pass_bytes", [1, 100_000, compare.PASS_BYTES])
def test_a_right_output_is_right_however_many_passes_it_takes(monkeypatch, pass_bytes):
    monkeypatch.setattr(compare, "PASS_BYTES", pass_bytes)
    source, _ = source_of(PROBLEM, 11)
    found = judge(source, np.arange(90), HOST)
    assert found.right
    assert found.rows == 90
    assert 0 < found.used < 1
    assert 0 < found.lse_used < 1
    assert found.error / found.tolerance == pytest.approx(found.used)


@pytest.mark.parametrize("pass_bytes", [1, compare.PASS_BYTES])
def test_says_where_the_worst_is(monkeypatch, pass_bytes):
    monkeypatch.setattr(compare, "PASS_BYTES", pass_bytes)
    source, arrays = source_of(PROBLEM, 12)
    arrays["output"][50, 1] *= 1.1
    arrays["output"][61, 3] *= 1.5
    arrays["lse"][44, 2] += 0.1
    found = judge(source, np.arange(90), HOST)
    assert found.worst == Place(61, 3)
    assert found.lse_worst == Place(44, 2)
    assert found.wrong == 3
    assert found.used > 10
    assert found.lse_used > 10


def test_an_error_in_a_row_that_is_not_looked_at_is_not_seen():
    source, arrays = source_of(PROBLEM, 13)
    arrays["output"][50] = 0
    assert judge(source, np.array([0, 49, 51, 89]), HOST).right
    assert not judge(source, np.array([0, 49, 50, 89]), HOST).right


@pytest.mark.parametrize("value", [np.nan, 5.0, np.inf])
def test_a_wrong_lse_of_a_row_without_keys_is_wrong(value):
    source, arrays = source_of(PROBLEM, 14)
    assert np.isneginf(arrays["lse"][3]).all()
    arrays["lse"][3, 0] = value
    found = judge(source, np.arange(90), HOST)
    assert found.lse_used == np.inf
    assert found.lse_worst == Place(3, 0)


def test_rows_that_see_a_nan_are_not_judged_but_counted():
    source, arrays = source_of(PROBLEM, 15)
    arrays["key"][40, 0] = np.nan  # rows from 60 on see it, by the heads 0 and 1
    arrays["output"][60:, :2] = np.nan
    arrays["lse"][60:, :2] = np.nan
    found = judge(source, np.arange(90), HOST)
    assert found.right
    assert found.not_judged == 30 * 2
    arrays["output"][59, 0, 0] = np.nan
    assert judge(source, np.arange(90), HOST).worst == Place(59, 0)


def test_reads_only_the_rows_that_were_chosen():
    source, _ = source_of(PROBLEM, 16)
    seen = []

    def read(name, spans):
        seen.append((name, spans))
        return source.read_output(name, spans)

    judge(Source(PROBLEM, source.read_input, read, True), np.array([0, 7, 8, 89]), HOST)
    wanted = (Span(0, 1), Span(7, 9), Span(89, 90))
    assert seen == [("output", wanted), ("lse", wanted)]
