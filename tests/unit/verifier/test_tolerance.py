"""Honest engines stay within the tolerance; engines with one fault don't."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.verifier.compare import excess, measure
from mdattn_mpi.verifier.reference import reference
from mdattn_mpi.verifier.tolerance import HOST, TENSOR_CORES, lse_tolerance, rounding_of

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def tensors(problem, seed):
    rng = np.random.default_rng(seed)
    dtype = DTYPES[problem.dtype]
    shapes = (
        (problem.q_tokens, problem.q_heads, problem.head_dim),
        (problem.kv_tokens, problem.kv_heads, problem.head_dim),
        (problem.kv_tokens, problem.kv_heads, problem.v_head_dim),
    )
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def engine(problem, q, k, v, rounding=HOST, shards=2):
    """Attend as an engine of `rounding` does, in float32, merging the partials of `shards`."""
    dtype = q.dtype
    group = problem.q_heads // problem.kv_heads
    k, v = (np.repeat(tensor.astype(np.float32), group, axis=1) for tensor in (k, v))
    scores = np.einsum("ind,jnd->nij", q.astype(np.float32), k) * np.float32(problem.scale)
    if problem.diagonal is not None:
        mask = np.tri(problem.q_tokens, problem.kv_tokens, problem.diagonal, dtype=bool)
        scores[:, ~mask] = -np.inf
    outputs, lses = [], []
    for part in np.array_split(np.arange(problem.kv_tokens), min(shards, problem.kv_tokens)):
        top = scores[..., part].max(axis=2, keepdims=True)
        top[top == -np.inf] = 0
        p = np.exp(scores[..., part] - top)
        total = p.sum(axis=2, keepdims=True)
        if rounding.weights:
            p = p.astype(dtype).astype(np.float32)
        out = np.einsum("nij,jnd->nid", p, v[part]) / np.maximum(total, 1e-37)
        outputs.append(out.astype(dtype).astype(np.float32) if rounding.partials else out)
        with np.errstate(divide="ignore"):
            lses.append(top + np.log(total))
    with np.errstate(invalid="ignore"):
        lse = np.logaddexp.reduce(lses, axis=0)
        merged = sum(
            np.nan_to_num(np.exp(part - lse)) * out for part, out in zip(lses, outputs, strict=True)
        )
    return merged.swapaxes(0, 1).astype(dtype), lse[..., 0].T


def judge(problem, q, k, v, output, rounding=HOST):
    """The worst ratio of error and tolerance over all rows and heads."""
    tensor = {"key": k, "value": v}
    rows = np.arange(problem.q_tokens)
    found = reference(problem, rows, q, lambda name, span: tensor[name][span.slice])
    return float(excess(measure(problem, found, output, rounding)).max())


problems = st.builds(
    AttentionProblem,
    q_tokens=st.integers(1, 60),
    kv_tokens=st.integers(1, 300),
    q_heads=st.just(4),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([1, 3, 16, 64, 128, 256]),
    v_head_dim=st.sampled_from([1, 2, 16, 64, 128, 256]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    causal=st.sampled_from(["none", "upper_left", "lower_right"]),
    scale=st.sampled_from([None, 1.0]),
)


@given(
    problem=problems,
    seed=st.integers(0, 2**32 - 1),
    rounding=st.sampled_from([HOST, TENSOR_CORES]),
    shards=st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_honest_engines_pass(problem, seed, rounding, shards):
    q, k, v = tensors(problem, seed)
    output, lse = engine(problem, q, k, v, rounding, shards)
    assert judge(problem, q, k, v, output, rounding) < 1

    tensor = {"key": k, "value": v}
    rows = np.arange(problem.q_tokens)
    found = reference(problem, rows, q, lambda name, span: tensor[name][span.slice])
    seen = np.isfinite(found.lse)
    assert (np.isneginf(lse) == ~seen).all()
    assert (abs(lse[seen] - found.lse[seen]) <= lse_tolerance(problem, found, rounding)[seen]).all()


SHAPES = {
    "short": AttentionProblem(96, 96, 4, 2, 64, 64),
    "long": AttentionProblem(8, 16_384, 4, 2, 64, 64),
    "causal": AttentionProblem(300, 300, 4, 2, 64, 64, causal="upper_left"),
    "wide": AttentionProblem(64, 2048, 4, 4, 128, 128, causal="lower_right"),
}


def zeros(problem, q, k, v, rounding):
    return np.zeros_like(engine(problem, q, k, v, rounding)[0])


def zero_row(problem, q, k, v, rounding):
    output, _ = engine(problem, q, k, v, rounding)
    output[-1] = 0
    return output


def swapped_heads(problem, q, k, v, rounding):
    return engine(problem, q, k, v, rounding)[0][:, [1, 0, 2, 3]]


def wrong_kv_head(problem, q, k, v, rounding):
    return engine(problem, q, k[:, ::-1], v[:, ::-1], rounding)[0]


def missing_shard(problem, q, k, v, rounding):
    kept = np.ones(problem.kv_tokens, bool)
    kept[problem.kv_tokens // 2 :: problem.kv_tokens // 8] = False  # 4 keys of all
    kept[problem.kv_tokens // 2 : problem.kv_tokens * 3 // 4] = False
    fewer = replace(problem, kv_tokens=int(kept.sum()), causal="none")
    return engine(fewer, q, k[kept], v[kept], rounding)[0]


def output_scaled(problem, q, k, v, rounding):
    output, _ = engine(problem, q, k, v, rounding)
    return (output.astype(np.float32) * 1.01).astype(output.dtype)


def softmax_scaled(problem, q, k, v, rounding):
    return engine(replace(problem, scale=problem.scale * 1.01), q, k, v, rounding)[0]


def rows_moved_by_one(problem, q, k, v, rounding):
    return np.roll(engine(problem, q, k, v, rounding)[0], 1, axis=0)


def one_element(problem, q, k, v, rounding):
    output, _ = engine(problem, q, k, v, rounding)
    output[-1, 1, 3] += output.std()
    return output


FAULTS = [
    zeros,
    zero_row,
    swapped_heads,
    wrong_kv_head,
    missing_shard,
    output_scaled,
    softmax_scaled,
    rows_moved_by_one,
    one_element,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_fault_is_caught(shape, dtype, backend, fault):
    problem, rounding = replace(SHAPES[shape], dtype=dtype), rounding_of(backend)
    q, k, v = tensors(problem, np.random.SeedSequence().entropy)
    assert judge(problem, q, k, v, fault(problem, q, k, v, rounding), rounding) > 1


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("off_by", [-1, 1])
@pytest.mark.parametrize("tokens", [64, 2048])
def test_a_mask_wrong_by_one_key_is_caught(tokens, off_by, dtype, backend):
    problem = AttentionProblem(64, tokens, 4, 2, 64, 64, dtype=dtype, causal="upper_left")
    q, k, v = tensors(problem, np.random.SeedSequence().entropy)
    wrong, _ = engine(problem, q, k, v, rounding_of(backend))
    for row in range(1, 63):
        one = replace(problem, q_tokens=1, kv_tokens=row + 1 + off_by, causal="none")
        seen = slice(one.kv_tokens)
        wrong[row] = engine(one, q[row : row + 1], k[seen], v[seen], rounding_of(backend))[0][0]
    assert judge(problem, q, k, v, wrong, rounding_of(backend)) > 1


def test_a_row_without_keys_must_be_exactly_zero():
    problem = AttentionProblem(8, 4, 2, 2, 16, 16, causal="lower_right")
    q, k, v = tensors(problem, 3)
    output, _ = engine(problem, q, k, v)
    assert judge(problem, q, k, v, output) < 1
    output[2, 1, 5] = 2**-20
    assert judge(problem, q, k, v, output) == np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_out_of_tolerance(bad):
    problem = SHAPES["short"]
    q, k, v = tensors(problem, 4)
    output, _ = engine(problem, q, k, v)
    output[5, 2, 7] = bad
    assert judge(problem, q, k, v, output) == np.inf


def test_an_unknown_backend_counts_as_a_gpu():
    assert rounding_of("cpu") == HOST
    assert rounding_of("tensorrt") == rounding_of("something new") == TENSOR_CORES
