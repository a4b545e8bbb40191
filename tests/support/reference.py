"""Dense attention in float64, and problems to try it on."""

from __future__ import annotations

from typing import Any, get_args

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.problem import AttentionProblem, Causal

Array = NDArray[Any]

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Half a unit in the last place for the rounding of the output, as much again for what is before it.
TOLERANCE = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def visible(problem: AttentionProblem) -> NDArray[np.bool_]:
    """The mask ``[Sq, Skv]``: which query sees which key, from the definition."""
    i = np.arange(problem.q_tokens)[:, None]
    j = np.arange(problem.kv_tokens)[None, :]
    mask = np.ones((problem.q_tokens, problem.kv_tokens), bool)
    after = j - i - (problem.kv_tokens - problem.q_tokens if problem.causal == "lower_right" else 0)
    if problem.causal != "none":
        mask &= after <= 0
    if problem.window[0] >= 0:
        mask &= after >= -problem.window[0]
    if problem.window[1] >= 0:
        mask &= after <= problem.window[1]
    for start in problem.segments:
        mask &= (i < start) == (j < start)
    return mask


def attention(
    problem: AttentionProblem, q: Array, k: Array, v: Array, sinks: Array | None = None
) -> tuple[Array, Array]:
    """Output ``[Sq, Nq, Hv]`` and natural-log LSE ``[Sq, Nq]``, both float64."""
    heads = np.arange(problem.q_heads) // (problem.q_heads // problem.kv_heads)
    q, k, v = q.astype(float), k.astype(float)[:, heads], v.astype(float)[:, heads]
    scores = problem.scale * np.einsum("ind,jnd->nij", q, k)
    if problem.softcap:
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    scores = np.where(visible(problem), scores, -np.inf)
    if sinks is not None:  # a key more, whose value is 0
        extra = np.broadcast_to(sinks.astype(float)[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, extra], 2)
        v = np.concatenate([v, np.zeros_like(v[:1])])
    top = np.maximum(scores.max(axis=2, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    out = np.einsum("nij,jnd->ind", weights / np.where(total, total, 1), v)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0].T
    return out, lse


def random_inputs(problem: AttentionProblem, seed: int) -> tuple[Array, ...]:
    """Q, K and V of standard normal numbers; V's mean is off 0, so that no output is nearly 0.

    And the sinks, where the problem has them.
    """
    random = np.random.default_rng(seed)
    dtype = DTYPES[problem.dtype]
    qkv = (
        random.standard_normal((problem.q_tokens, problem.q_heads, problem.head_dim)).astype(dtype),
        random.standard_normal((problem.kv_tokens, problem.kv_heads, problem.head_dim)).astype(
            dtype
        ),
        (
            1 + random.standard_normal((problem.kv_tokens, problem.kv_heads, problem.v_head_dim))
        ).astype(dtype),
    )
    if not problem.sinks:
        return qkv
    return (*qkv, random.normal(1, 2, problem.q_heads).astype(np.float32))


def assert_close(
    problem: AttentionProblem, out: Array, lse: Array, expected: tuple[Array, Array]
) -> None:
    """Compare with the reference; the error may grow with the largest value of V's."""
    right, right_lse = expected
    assert out.shape == right.shape
    assert out.dtype == DTYPES[problem.dtype]
    assert lse.shape == right_lse.shape
    assert lse.dtype == np.float32
    bound = TOLERANCE[problem.dtype] * (1 + np.abs(right))
    assert (np.abs(out.astype(float) - right) <= bound).all()
    empty = np.isneginf(right_lse)
    assert (np.isneginf(lse) == empty).all()
    np.testing.assert_allclose(lse[~empty], right_lse[~empty], rtol=1e-4, atol=1e-4)


@st.composite
def problems(draw: st.DrawFn, max_tokens: int = 70, max_head_dim: int = 40) -> AttentionProblem:
    """Small problems of every kind: lengths, heads, head dims, masks, dtypes."""
    causal: Causal = draw(st.sampled_from(get_args(Causal)))
    sides = st.just(-1) | st.integers(0, max_tokens)
    window = draw(st.just((-1, -1)) | st.tuples(sides, sides if causal == "none" else st.just(0)))
    kv_heads = draw(st.integers(1, 4))
    head_dim = draw(st.integers(1, max_head_dim))
    q_tokens = draw(st.integers(1, max_tokens))
    kv_tokens = draw(st.just(q_tokens) | st.integers(1, max_tokens))
    segments: set[int] = set()
    if kv_tokens == q_tokens:
        segments = draw(
            st.just(set()) | st.sets(st.integers(0, q_tokens - 1)).map(lambda s: s | {0})
        )
    return AttentionProblem(
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        q_heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=draw(st.just(head_dim) | st.integers(1, max_head_dim)),
        dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        causal=causal,
        scale=draw(st.none() | st.floats(0.01, 1.0)),  # type: ignore[arg-type]
        window=window,
        softcap=draw(st.just(0.0) | st.floats(0.25, 8.0)),
        sinks=draw(st.booleans()),
        segments=tuple(sorted(segments)),
    )
