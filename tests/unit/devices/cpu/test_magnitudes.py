"""Finite inputs of any size: what float64 gives, wherever that fits the output."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.devices.cpu import tile
from mdattn_mpi.devices.cpu.blocked_attention import BlockedAttention
from mdattn_mpi.devices.cpu.partial import Partial
from mdattn_mpi.partition import blocks
from mdattn_mpi.problem import AttentionProblem, Plan, Span
from tests.support.group import attend_in_group
from tests.support.reference import DTYPES, attention

Array = NDArray[Any]
Inputs = tuple[Array, Array, Array]

# Half a unit in the last place of the output, as much again for what is before it, and half the
# smallest number there is.
ROUNDING = {"bfloat16": (2.0**-8, 2.0**-133), "float16": (2.0**-11, 2.0**-24)}


def attend(problem: AttentionProblem, q: Array, k: Array, v: Array, cut: int = 0) -> Inputs:
    """Output and LSE, the keys before `cut` and those after it in two calls, as `ring` does."""
    engine, partial = (
        BlockedAttention(1, lambda: None),
        Partial(q, v.shape[2], problem.scale, problem.softcap),
    )
    for span in (Span(cut, len(k)), Span(0, cut)):
        for block in blocks((Span(0, len(q)),), (span,), problem.mask):
            keys = block.kv.shift(span.start).slice
            engine.attend(partial, block.q, k[keys], v[keys], block.band)
    return engine.finish(partial)


def in_float32(problem: AttentionProblem, q: Array, k: Array, v: Array) -> Array:
    """The formula without regard to sizes: a reference of 0 for scores below `HEADROOM`."""
    q, k, v = (array.astype(np.float32) for array in (q, k, v))
    heads = np.arange(problem.q_heads) // problem.group_heads
    with np.errstate(all="ignore"):
        scores = np.einsum("ind,jnd->nij", q * np.float32(problem.scale), k[:, heads])
        top = scores.max(axis=2, keepdims=True)
        weights = np.exp(scores - np.where(abs(top) <= tile.HEADROOM, 0, top))
        total = weights.sum(axis=2, dtype=np.float32)
        out = np.einsum("nij,jnd->ind", weights, v[:, heads]) / total.T[..., None]
        return np.asarray(out.astype(DTYPES[problem.dtype]))


def close(problem: AttentionProblem, out: Array, q: Array, k: Array, v: Array) -> bool:
    """Whether `out` is what float64 gives, give or take a rounding of each p · v."""
    right, _ = attention(problem, q, k, v)
    size, _ = attention(problem, q, k, np.abs(v))
    relative, absolute = ROUNDING[problem.dtype]
    with np.errstate(invalid="ignore"):
        return bool((abs(out.astype(float) - right) <= relative * size + absolute).all())


def determined(problem: AttentionProblem, q: Array, k: Array, v: Array) -> bool:
    """Whether float64's own rounding leaves the result alone: not if two huge scores are equal."""
    noise = np.random.default_rng(0).integers(-2, 3, q.shape) * 2.0**-52
    return close(problem, attention(problem, q.astype(float) * (1 + noise), k, v)[0], q, k, v)


def normal(problem: AttentionProblem, sizes: tuple[float, float, float], seed: int = 3) -> Inputs:
    """Q, K and V of normal numbers times `sizes`, within what the dtype holds."""
    random = np.random.default_rng(seed)
    dtype = DTYPES[problem.dtype]
    most = float(ml_dtypes.finfo(dtype).max)
    shapes = (
        (problem.q_tokens, problem.q_heads, problem.head_dim),
        (problem.kv_tokens, problem.kv_heads, problem.head_dim),
        (problem.kv_tokens, problem.kv_heads, problem.v_head_dim),
    )
    arrays = (
        np.clip(random.standard_normal(shape) * size, -most, most).astype(dtype)
        for shape, size in zip(shapes, sizes, strict=True)
    )
    return next(arrays), next(arrays), next(arrays)


def problem_of(scale: float | None = None, dtype: Any = "bfloat16", causal: Any = "none") -> Any:
    return AttentionProblem(70, 70, 4, 2, 16, 16, dtype, causal, scale)


CASES: dict[str, tuple[AttentionProblem, tuple[float, float, float]]] = {
    "values of 1e34": (problem_of(), (3, 1.2, 1e34)),
    "values of 3e38": (problem_of(), (0, 0, 3e38)),
    "values of 1e-37, small weights": (problem_of(0.25, causal="lower_right"), (5, 5, 1e-37)),
    "values of 1e-40": (problem_of(0.25), (5, 5, 1e-40)),
    "scores beyond float32": (problem_of(), (1e19, 1e19, 1)),
    "scores of 1e76": (problem_of(1.0, causal="upper_left"), (3e38, 3e38, 1)),
    "scores of 1e8": (problem_of(1.0), (3e4, 3e4, 1)),
    "scale of 3e38": (problem_of(3e38), (1, 1, 1)),
    "scale of 3e38, float16": (problem_of(3e38, "float16"), (1, 1, 1e4)),
    "scale of 1e-44": (problem_of(1e-44), (3e22, 3e22, 1)),
    "large queries, small keys": (problem_of(1e30), (1e-30, 1, 1)),
    "scores of 1e6, float16": (problem_of(1.0, "float16"), (3e2, 3e3, 1)),
}


@pytest.mark.parametrize("cut", [0, 23])
@pytest.mark.parametrize("name", CASES)
def test_what_float64_gives(name: str, cut: int) -> None:
    problem, sizes = CASES[name]
    inputs = normal(problem, sizes)
    out, lse = attend(problem, *inputs, cut)
    assert close(problem, out, *inputs)
    with np.errstate(over="ignore"):
        right = attention(problem, *inputs)[1].astype(np.float32)
    np.testing.assert_allclose(lse, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("name", CASES)
def test_every_strategy_gives_it_too(name: str, strategy: Any) -> None:
    problem, sizes = CASES[name]
    inputs = normal(problem, sizes)
    out, _ = attend_in_group(Plan(problem, strategy, 3), *inputs)
    assert close(problem, out, *inputs)


CONTROLS = [
    "values of 1e34",
    "values of 3e38",
    "scores beyond float32",
    "scale of 3e38",
    "scale of 1e-44",
]


@pytest.mark.parametrize("name", CONTROLS)
def test_float32_alone_does_not(name: str) -> None:
    problem, sizes = CASES[name]
    inputs = normal(problem, sizes)
    assert not close(problem, in_float32(problem, *inputs), *inputs)


def test_small_weights_of_the_smallest_values() -> None:
    """All scores are -22, within `HEADROOM` of 0: in float32 every product would vanish."""
    problem = problem_of(1.0)
    q, k, v = normal(problem, (0, 0, 1e-39))
    q[..., 0], k[..., 0] = 22, -1
    assert close(problem, attend(problem, q, k, v)[0], q, k, v)
    assert not close(problem, in_float32(problem, q, k, v), q, k, v)


def test_scores_that_differ_little_for_their_size() -> None:
    """Float32 counts in steps of 1 at 1e7."""
    problem = problem_of(1.0)
    q, k, v = normal(problem, (1, 1, 1))
    q[..., 0], k[..., 0] = 1e4, 1e3
    assert close(problem, attend(problem, q, k, v)[0], q, k, v)
    assert not close(problem, in_float32(problem, q, k, v), q, k, v)


def test_usual_inputs_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    store = tile._Rows.store
    monkeypatch.setattr(tile._Rows, "store", lambda rows: widths.append(rows.wide) or store(rows))
    for dtype in DTYPES:
        problem = AttentionProblem(300, 700, 4, 2, 128, 128, dtype)  # type: ignore[arg-type]
        attend(problem, *normal(problem, (3, 3, 1)))
        assert widths
        assert not any(widths)
    attend(problem_of(), *normal(problem_of(), (1, 1, 1e30)))
    assert widths[-1]


def test_equal_scores_beyond_float32_weigh_the_same() -> None:
    """In several blocks and calls: a reference of 1e76 must not add rounding to scores."""
    problem = AttentionProblem(5, 1500, 2, 1, 40, 8, "bfloat16", scale=1.0)
    q, _, v = normal(problem, (1e38, 1, 1))
    k = np.broadcast_to(abs(q[:1, :1]), (1500, 1, 40)).copy()
    q = abs(q)
    assert close(problem, attend(problem, q, k, v, 700)[0], q, k, v)


exponents = {"bfloat16": st.floats(-40, 38), "float16": st.floats(-8, 4.8)}


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(list(DTYPES)), st.sampled_from(["none", "upper_left"]))
def test_any_magnitudes(data: st.DataObject, dtype: str, causal: str) -> None:
    sizes = [10 ** data.draw(exponents[dtype], name) for name in ("q", "k", "v")]
    scale = data.draw(st.none() | st.floats(-37, 38.5).map(lambda x: 10**x))
    problem = AttentionProblem(
        9, 33, 4, 2, 12, 5, dtype=dtype, causal=causal, scale=scale  # type: ignore[arg-type]
    )  # fmt: skip
    inputs = normal(problem, (sizes[0], sizes[1], sizes[2]), data.draw(st.integers(0, 2**32 - 1)))
    cut = data.draw(st.sampled_from([0, 11]))
    assume(determined(problem, *inputs))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tile, "BLOCK_KEYS", 8)
        assert close(problem, attend(problem, *inputs, cut)[0], *inputs)
