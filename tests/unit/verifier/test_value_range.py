"""Every number of an output against the values that its row sees."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.verifier import survey as survey_module
from mdattn_mpi.verifier import value_range
from mdattn_mpi.verifier.compare import Place, Source
from mdattn_mpi.verifier.survey import Impossible, survey
from mdattn_mpi.verifier.value_range import ValueRange, ordered
from tests.support.group import take
from tests.support.reference import DTYPES, attention, problems, random_inputs, visible


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_keys_are_in_the_order_of_the_numbers(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        numbers = every[~np.isnan(every)]
    by_key = numbers[np.argsort(ordered(numbers))].astype(float)
    assert (np.diff(by_key) >= 0).all()
    keys = np.sort(ordered(numbers))
    assert (np.diff(keys) == 1).all()


def flags(problem, value, output):
    """Which rows and heads `ValueRange` finds outside."""
    found = ValueRange(problem, lambda span: value[span.slice])
    return found.outside(Span(0, problem.q_tokens), output)


def by_definition(problem, value, output):
    """The same, row by row, in float64."""
    found = np.zeros(output.shape[:2], bool)
    dtype = DTYPES[problem.dtype]
    for (row, head), _ in np.ndenumerate(found):
        seen = value[visible(problem)[row], head // problem.group_heads]
        if not len(seen):
            found[row, head] = (output[row, head] != 0).any()
            continue
        if problem.sinks:
            seen = np.concatenate([seen, np.zeros_like(seen[:1])])
        low, high = (
            np.clip(np.nextafter(side, np.array(way, dtype)), *limits(dtype)).astype(float)
            for side, way in ((seen.min(axis=0), -np.inf), (seen.max(axis=0), np.inf))
        )
        number = output[row, head].astype(float)
        found[row, head] = not ((number >= low) & (number <= high)).all()
    return found


def limits(dtype):
    return ml_dtypes.finfo(dtype).min, ml_dtypes.finfo(dtype).max


@settings(max_examples=80, deadline=None)
@given(problems(max_tokens=40, max_head_dim=6), st.integers(0, 2**32 - 1), st.data())
def test_what_is_outside_is_found_and_nothing_else(problem, seed, data):
    q, k, v, *sinks = random_inputs(problem, seed)
    if data.draw(st.booleans()):
        v = (v.astype(float) * 1e4).clip(*limits(v.dtype)).astype(v.dtype)
    output = attention(problem, q, k, v, *sinks)[0].astype(v.dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(value_range, "GROUP", data.draw(st.integers(1, 9)))
        monkeypatch.setattr(value_range, "PIECE", data.draw(st.integers(1, 500)))
        assert not flags(problem, v, output).any()
        random = np.random.default_rng(seed)
        noise = random.choice([0, 0, 0, 0.5, 1, 3], output.shape) * random.standard_normal()
        output = (output.astype(float) * (1 + noise)).clip(*limits(v.dtype)).astype(v.dtype)
        output[random.random(output.shape) < 0.02] = random.choice([np.nan, np.inf, -np.inf])
        found, right = flags(problem, v, output), by_definition(problem, v, output)
        if problem.window[0] < 0 and not problem.segments:
            np.testing.assert_array_equal(found, right)
        assert not (found & ~right).any()  # values of a few keys more are let pass


@pytest.mark.parametrize("masked", [{"window": (20, 0)}, {"segments": (0, 300, 301, 700)}])
def test_values_out_of_sight_are_no_excuse(masked):
    """Values rise along the sequence: those of another document, or beyond a window, stand out."""
    problem = AttentionProblem(1000, 1000, 2, 1, 4, 3, causal="upper_left", **masked)
    q, k, _ = random_inputs(problem, 1)
    v = np.broadcast_to(np.arange(1000.0)[:, None, None] // 8, (1000, 1, 3))
    v = v.astype(ml_dtypes.bfloat16)
    output = attention(problem, q, k, v)[0].astype(v.dtype)
    assert not flags(problem, v, output).any()
    unmasked = attention(replace(problem, window=(-1, -1), segments=()), q, k, v)[0]
    found = flags(problem, v, unmasked.astype(v.dtype))
    assert found[705:].mean() > 0.9


def test_a_sink_pulls_towards_0_and_no_further():
    problem = AttentionProblem(3, 5, 1, 1, 2, 2, sinks=True)
    value, output = np.full((5, 1, 2), 3, np.float16), np.ones((3, 1, 2), np.float16)
    output[1, 0, 1], output[2, 0, 0] = -1, 3.1
    assert flags(replace(problem, dtype="float16"), value, output)[:, 0].tolist() == [
        False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_leave_no_room_for_infinity(dtype):
    problem = AttentionProblem(3, 3, 1, 1, 2, 2, dtype=dtype)
    value = np.full((3, 1, 2), limits(DTYPES[dtype])[1])
    output = value.copy()
    output[1, 0, 0] = np.inf
    assert flags(problem, value, output)[:, 0].tolist() == [False, True, False]
    assert flags(problem, -value, -output)[:, 0].tolist() == [False, True, False]


def test_one_number_more_is_allowed_and_no_second():
    problem = AttentionProblem(4, 5, 2, 1, 2, 3)
    value = np.ones((5, 1, 3), ml_dtypes.bfloat16)
    output = np.ones((4, 2, 3), ml_dtypes.bfloat16)
    output.view(np.uint16)[1, 0, 2] += 1
    assert not flags(problem, value, output).any()
    output.view(np.uint16)[1, 0, 2] += 1
    assert np.argwhere(flags(problem, value, output)).tolist() == [[1, 0]]


PROBLEM = AttentionProblem(90, 70, 4, 2, 16, 24, causal="lower_right")
SHARDS = ((Span(0, 20), Span(70, 90)), (Span(20, 70),))


def source_of(problem=PROBLEM, seed=1):
    q, k, v = random_inputs(problem, seed)
    out, lse = attention(problem, q, k, v)
    out, lse = out.astype(DTYPES[problem.dtype]), lse.astype(np.float32)
    arrays = {"query": q, "key": k, "value": v, "output": out, "lse": lse}

    def read(name, spans):
        return take(arrays[name], spans)

    return Source(problem, read, read, lse=True), arrays


def test_a_right_output_is_possible_and_its_checksums_are_those_of_its_shards():
    source, arrays = source_of()
    found = survey(source, SHARDS)
    assert found.impossible == 0
    before = found.crc32s
    arrays["output"].view(np.uint16)[75, 0, 0] ^= 1
    after = survey(source, SHARDS).crc32s
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)


CORRUPTIONS = {
    "nan": ("output", (41, 2, 5), np.nan),
    "infinity": ("output", (88, 3, 0), -np.inf),
    "too large": ("output", (41, 2, 5), 100),
    "a row without keys": ("output", (7, 1, 3), 2.0**-20),
    "an LSE that is nan": ("lse", (41, 2), np.nan),
    "an LSE as if no key were seen": ("lse", (41, 2), -np.inf),
    "an LSE where no key is seen": ("lse", (7, 1), 0),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_one_impossible_number_is_found(name):
    result, place, value = CORRUPTIONS[name]
    source, arrays = source_of()
    arrays[result][place] = value
    found = survey(source, SHARDS)
    expected = Impossible(1, Place(*place[:2]))
    assert (found.outputs if result == "output" else found.lses) == expected
    assert found.impossible == 1


def test_values_that_come_later_are_out_of_bounds_under_a_mask_only():
    source, arrays = source_of(replace(PROBLEM, q_tokens=70, causal="upper_left"))
    arrays["value"][60, 0, 3] = 50
    arrays["output"][59, 1, 3] = 20
    assert survey(source, [(Span(0, 70),)]).outputs == Impossible(1, Place(59, 1))
    unmasked = Source(replace(source.problem, causal="none"), source.read_input, source.read_output)
    assert survey(unmasked, [(Span(0, 70),)]).outputs == Impossible()


@pytest.mark.parametrize("tensor", ["key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_see_a_nonfinite_key_or_value_may_hold_anything(monkeypatch, tensor, bad):
    monkeypatch.setattr(survey_module, "READ_TOKENS", 16)
    source, arrays = source_of()
    arrays[tensor][40, 0, 1] = bad  # rows from 60 on see it, by the heads 0 and 1
    for result in ("output", "lse"):
        arrays[result][60:, :2] = np.nan
    assert survey(source, SHARDS).impossible == 0
    arrays["output"][60, 2] = np.nan
    arrays["output"][59, 0] = np.nan
    assert survey(source, SHARDS).outputs == Impossible(2, Place(59, 0))


def test_a_nonfinite_query_excuses_its_own_row_and_head():
    source, arrays = source_of()
    arrays["query"][50, 1, 0] = np.inf
    arrays["output"][50, 1] = np.nan
    assert survey(source, SHARDS).impossible == 0
    arrays["output"][50, 0] = np.nan
    assert survey(source, SHARDS).outputs == Impossible(1, Place(50, 0))
