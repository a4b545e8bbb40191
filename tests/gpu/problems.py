"""The problems that real GPUs are checked with, and what is right for them in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from mdattn_mpi.problem import AttentionProblem

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}  # ‖error‖ / ‖right‖, merges included
SMALL = (
    # q, kv tokens, q heads, kv heads, head dims
    (333, 777, 8, 2, 128, 128),
    (1, 513, 8, 8, 128, 128),
    (3, 2, 4, 1, 64, 64),
    (1000, 1000, 4, 4, 64, 128),
    (257, 300, 4, 2, 192, 128),
    (301, 257, 4, 4, 256, 256),
    (2049, 2049, 6, 3, 72, 56),
    (700, 900, 6, 2, 64, 64),
    (500, 501, 10, 2, 96, 72),
    (301, 400, 2, 2, 40, 256),
    (130, 1, 2, 2, 8, 8),
)


MASKED = (  # each with and without a soft cap and sinks
    # q, kv tokens, q heads, kv heads, head dims, dtype, causal, window, documents begin at
    (777, 777, 8, 2, 128, 128, "bfloat16", "upper_left", (100, 0), ()),
    (777, 777, 8, 2, 128, 128, "bfloat16", "none", (1, 0), ()),
    (777, 777, 8, 2, 128, 128, "bfloat16", "none", (60, 31), ()),
    (333, 777, 8, 2, 128, 128, "bfloat16", "lower_right", (200, 0), ()),
    (777, 333, 8, 2, 128, 128, "bfloat16", "upper_left", (40, 0), ()),
    (900, 900, 4, 4, 64, 64, "float16", "none", (-1, 77), ()),
    (900, 900, 4, 4, 64, 64, "float16", "none", (500, -1), ()),
    (900, 900, 4, 4, 64, 64, "float16", "none", (-1, -1), (0, 1, 300, 317, 800)),
    (900, 900, 4, 4, 64, 64, "float16", "upper_left", (-1, -1), (0, 450, 451)),
    (900, 900, 4, 4, 64, 64, "float16", "upper_left", (30, 0), tuple(range(0, 900, 50))),
    (900, 900, 4, 4, 64, 64, "float16", "upper_left", (-1, -1), ()),
)


def problems() -> list[AttentionProblem]:
    """Every mask with odd sizes, both dtypes in turn."""
    masks = ("none", "upper_left", "lower_right")
    return [
        AttentionProblem(*shape, dtype, causal)  # type: ignore[arg-type]
        for shape, (causal, dtype) in itertools.product(
            SMALL, zip(masks, ("bfloat16", "float16", "bfloat16"), strict=True)
        )
    ]


def masked_problems() -> list[AttentionProblem]:
    """Windows and packed documents, with soft caps and sinks."""
    return [
        AttentionProblem(
            *shape,
            dtype,
            causal,
            window=window,
            segments=segments,
            softcap=cap,
            sinks=sinks,  # type: ignore[arg-type]
        )
        for (*shape, dtype, causal, window, segments), (cap, sinks) in itertools.product(
            MASKED, ((0.0, False), (0.0, True), (5.0, False), (5.0, True))
        )
    ]


def others(problem: AttentionProblem) -> list[AttentionProblem]:
    """One option away: what is right for them must be far from what is right for `problem`."""
    found = []
    before, after = problem.window
    if before >= 0:
        found.append(replace(problem, window=(before + 1, after)))
    if after >= 0 and problem.causal == "none":
        found.append(replace(problem, window=(before, after + 1)))
    if problem.softcap:
        found.append(replace(problem, softcap=0.0))
    if problem.sinks:
        found.append(replace(problem, sinks=False))
    if problem.segments:
        found.append(replace(problem, segments=()))
    return found


def inputs(problem: AttentionProblem, random: np.random.Generator) -> list[Any]:
    """Q, K, V, and the sinks if it has them; weights are far from uniform."""
    shapes = (
        (problem.q_tokens, problem.q_heads, problem.head_dim),
        (problem.kv_tokens, problem.kv_heads, problem.head_dim),
        (problem.kv_tokens, problem.kv_heads, problem.v_head_dim),
    )
    arrays = [random.standard_normal(shape).astype(DTYPES[problem.dtype]) for shape in shapes]
    if problem.softcap:
        arrays[0] *= 3
    if problem.sinks:
        arrays.append(
            random.normal(6 if problem.softcap else 3, 2, problem.q_heads).astype(np.float32)
        )
    return arrays


def visible(problem: AttentionProblem) -> Any:
    """Which query sees which key, from the definition."""
    import torch

    i = torch.arange(problem.q_tokens, device="cuda")[:, None]
    j = torch.arange(problem.kv_tokens, device="cuda")[None]
    lower_right = problem.causal == "lower_right"
    after = j - i - (problem.kv_tokens - problem.q_tokens if lower_right else 0)
    seen = after < problem.kv_tokens  # all
    if problem.causal != "none":
        seen &= after <= 0
    before_it, after_it = problem.window
    if before_it >= 0:
        seen &= after >= -before_it
    if after_it >= 0:
        seen &= after <= after_it
    if problem.segments:
        starts = torch.tensor(problem.segments, device="cuda")
        seen &= torch.bucketize(i, starts, right=True) == torch.bucketize(j, starts, right=True)
    return seen


def reference(
    problem: AttentionProblem, q: Any, k: Any, v: Any, sinks: Any = None
) -> tuple[Any, Any]:
    """Output and LSE in float64, by PyTorch on the GPU."""
    import torch

    q, k, v = (torch.tensor(a.astype(np.float64), device="cuda") for a in (q, k, v))
    k, v = (a.repeat_interleave(problem.group_heads, 1) for a in (k, v))
    scores = torch.einsum("ind,jnd->nij", q, k) * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~visible(problem), -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, torch.tensor(sinks, device="cuda").double()[:, None])
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    return torch.einsum("nij,jnd->ind", weights, v).cpu().numpy(), lse.T.cpu().numpy()
