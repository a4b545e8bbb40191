"""The NumPy engine against float64, on everything that can go differently inside it."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.devices.cpu import blocked_attention, tile
from mdattn_mpi.devices.cpu.blocked_attention import BlockedAttention
from mdattn_mpi.devices.cpu.partial import Partial
from mdattn_mpi.mask import FULL, LOWER_RIGHT
from mdattn_mpi.partition import blocks
from mdattn_mpi.problem import AttentionProblem, Span
from tests.support.reference import assert_close, attention, problems, random_inputs

Array = NDArray[Any]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut finely, so that small inputs have many tiles, blocks, strips and panels."""
    cut_finely(monkeypatch)


def cut_finely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "TILE_ROWS", 24)
    monkeypatch.setattr(tile, "BLOCK_KEYS", 16)
    monkeypatch.setattr(tile, "STRIP_ROWS", 8)


def attend(
    problem: AttentionProblem, q: Array, k: Array, v: Array, *sinks: Array, threads: int = 1
) -> tuple[Array, Array]:
    """The whole problem in rectangles, as a strategy on one rank does it."""
    engine = BlockedAttention(threads, lambda: None)
    partial = Partial(q, v.shape[2], problem.scale, problem.softcap)
    whole = [(Span(0, problem.q_tokens),), (Span(0, problem.kv_tokens),)]
    for block in blocks(*whole, problem.mask):
        keys = block.kv.slice
        engine.attend(partial, block.q, k[keys], v[keys], block.band)
    result = engine.finish(partial, *sinks)
    engine.close()
    return result


@settings(max_examples=150, deadline=None)
@given(problems(max_tokens=130, max_head_dim=24), st.integers(0, 2**32 - 1))
def test_any_problem(problem: AttentionProblem, seed: int) -> None:
    inputs = random_inputs(problem, seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_finely(monkeypatch)
        assert_close(problem, *attend(problem, *inputs), attention(problem, *inputs))


@pytest.mark.parametrize("causal", ["none", "upper_left", "lower_right"])
@pytest.mark.parametrize("dim", [1, 2, 63, 64, 128, 255, 256])
def test_head_dims(dim: int, causal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # blocks as they are in earnest
    problem = AttentionProblem(333, 701, 2, 1, dim, 257 - dim, "float16", causal)
    inputs = random_inputs(problem, dim)
    assert_close(problem, *attend(problem, *inputs), attention(problem, *inputs))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
@pytest.mark.parametrize("causal", ["none", "upper_left"])
def test_scores_far_from_zero(scale: float, causal: Any) -> None:
    """Scores of hundreds, rising and falling along the keys, so that references must move."""
    problem = AttentionProblem(90, 90, 4, 2, 16, 16, "bfloat16", causal, scale)
    q, k, v = random_inputs(problem, 3)
    slope = np.linspace(-6, 6, 90)[:, None, None]
    for rising in (slope, -slope, slope - 20, slope + 20):
        k = (rising * np.sign(q[:1, ::2].astype(float)) + 0.1 * k.astype(float)).astype(k.dtype)
        assert_close(problem, *attend(problem, q, k, v), attention(problem, q, k, v))


def test_pieces_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = AttentionProblem(70, 120, 6, 2, 9, 5)
    q, k, v = random_inputs(problem, 11)
    k[60:] *= 9  # the reference has to move, upwards or not, depending on the order
    right = attention(problem, q, k, v)
    rectangles = [
        (Span(rows, rows + 35), slice(keys, keys + 30))
        for rows in (0, 35)
        for keys in range(0, 120, 30)
    ]
    for seed in range(5):
        engine, partial = BlockedAttention(1, lambda: None), Partial(q, 5, problem.scale)
        for index in np.random.default_rng(seed).permutation(len(rectangles)):
            rows, keys = rectangles[index]
            engine.attend(partial, rows, k[keys], v[keys], FULL)
        assert_close(problem, *engine.finish(partial), right)


@pytest.mark.parametrize("causal", ["none", "lower_right"])
def test_bytes_are_the_same_for_any_number_of_threads(causal: Any) -> None:
    problem = AttentionProblem(200, 230, 6, 3, 32, 24, "bfloat16", causal)
    inputs = random_inputs(problem, 17)
    inputs[1][100:] *= 20  # some rows move their reference, some don't
    one = [array.tobytes() for array in attend(problem, *inputs)]
    assert len(set(one[0])) > 50
    for threads in (2, 3, 8):
        assert [array.tobytes() for array in attend(problem, *inputs, threads=threads)] == one


def test_rows_that_saw_nothing() -> None:
    q = np.ones((40, 2, 8), ml_dtypes.bfloat16)
    engine, partial = BlockedAttention(1, lambda: None), Partial(q, 3, 1.0)
    v = np.full((20, 1, 3), 7, q.dtype)
    engine.attend(partial, Span(10, 30), np.ones((20, 1, 8), q.dtype), v, LOWER_RIGHT)
    out, lse = engine.finish(partial)
    seen = np.zeros(40, bool)
    seen[10:30] = True
    assert (out[~seen] == 0).all()
    assert (out[seen] == 7).all()
    assert np.isneginf(lse[~seen]).all()
    np.testing.assert_allclose(lse[seen, 0], 8 + np.log(np.arange(1, 21)), rtol=1e-6)


def test_no_keys_and_no_rows() -> None:
    engine = BlockedAttention(2, lambda: None)
    q = np.ones((5, 2, 8), np.float16)
    partial = Partial(q, 3, 1.0)
    engine.attend(partial, Span(0, 5), q[:0, :1], q[:0, :1, :3], FULL)
    engine.attend(partial, Span(2, 2), q[:, :1], q[:, :1, :3], FULL)
    out, lse = engine.finish(partial)
    assert not out.any()
    assert np.isneginf(lse).all()
    out, lse = engine.finish(Partial(q[:0], 3, 1.0))
    assert out.shape == (0, 2, 3)
    assert lse.shape == (0, 2)
    engine.close()


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_inputs_reach_what_they_touch_and_nothing_else(where: str, value: float) -> None:
    problem = AttentionProblem(100, 100, 4, 2, 8, 8, "float16", "upper_left")
    arrays = dict(zip("qkv", random_inputs(problem, 23), strict=True))
    clean = attend(problem, *arrays.values())[0]
    arrays[where][62, 1] = value  # in mid-strip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = attend(problem, *arrays.values())
    heads = slice(1, 2) if where == "q" else slice(2, 4)
    rows = slice(62, 63) if where == "q" else slice(62, 100)
    untouched = np.ones((100, 4), bool)
    untouched[rows, heads] = False
    ulp = 2.0**-10  # what stands beside it in a tile may be computed in another precision
    np.testing.assert_allclose(out[untouched].astype(float), clean[untouched].astype(float), ulp)
    assert np.isfinite(lse[untouched]).all()
    if np.isnan(value):
        assert np.isnan(out[rows, heads].astype(float)).all()


def test_every_float16_is_converted_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    target = np.empty(2**16, np.float32)
    for numbers in (every, every[np.isfinite(every)]):
        tile._convert(numbers, target[: len(numbers)])
        expected = numbers.astype(np.float32)
        np.testing.assert_array_equal(target[: len(numbers)], expected)
        np.testing.assert_array_equal(np.signbit(target[: len(numbers)]), np.signbit(expected))


def test_keys_of_minus_infinity_are_not_seen() -> None:
    """A mask of one's own: a score of −∞ weighs nothing, and a row of them is empty."""
    q = np.ones((30, 1, 4), np.float16)
    k = np.ones((30, 1, 4), np.float16)
    k[5:] = -np.inf
    v = np.arange(30, dtype=np.float16)[:, None, None]
    engine = BlockedAttention(1, lambda: None)
    for keys, expected in ((slice(0, 30), 2.0), (slice(5, 30), 0.0)):
        partial = Partial(q, 1, 1.0)
        engine.attend(partial, Span(0, 30), k[keys], v[keys], FULL)
        out, lse = engine.finish(partial)
        assert (out == expected).all()
        assert np.isneginf(lse).all() == (expected == 0)


def test_the_caller_polls_and_errors_come_back() -> None:
    polled = 0

    def poll() -> None:
        nonlocal polled
        polled += 1
        if polled == 7:
            raise KeyError("from poll")

    engine = BlockedAttention(3, poll)
    q = np.ones((400, 4, 8), np.float16)

    def attend_for_long() -> None:
        for _ in range(50):
            engine.attend(Partial(q, 8, 1.0), Span(0, 400), q, q, FULL)

    with pytest.raises(KeyError, match="from poll"):
        attend_for_long()
    assert polled == 7
    partial = Partial(q, 8, 1.0)
    engine.attend(partial, Span(0, 400), q, q, FULL)  # and it goes on
    assert (engine.finish(partial)[0] == 1).all()
    engine.close()
