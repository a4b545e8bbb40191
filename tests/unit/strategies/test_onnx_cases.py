"""ONNX's own cases of Attention with windows and soft caps, of the operator's versions 23 to 25."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName
from tests.support.group import attend_in_group

pytest.importorskip("onnx", reason="needs ONNX: pip install 'mdattn_mpi[onnx]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import attention as standard

NAMES = [
    "local_window",
    "3d_local_window",
    "bidirectional_window",
    "local_window_default",
    "softcap",
    "gqa_softcap",
    "diff_head_sizes_softcap",
    "3d_softcap",
    "3d_gqa_softcap",
    "3d_diff_head_sizes_softcap",
]


def case_of(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Any], Any]:
    """The attributes of the node, Q, K and V as ``[B, S, N, H]``, and the output likewise."""
    export = getattr(standard.Attention, f"export_attention_{name}", None)
    if export is None:
        pytest.skip(f"this ONNX has no case {name}")
    found: dict[str, Any] = {}
    monkeypatch.setattr(standard, "expect", lambda node, **case: found.update(case, node=node))
    np.random.seed(7)  # what the cases draw from
    export()
    said = {each.name: each.f or each.i for each in found["node"].attribute}
    heads = said.get("q_num_heads"), *(said.get("kv_num_heads"),) * 2, said.get("q_num_heads")
    arrays = [
        array.reshape(*array.shape[:2], count, -1) if array.ndim == 3 else array.swapaxes(1, 2)
        for array, count in zip((*found["inputs"], *found["outputs"]), heads, strict=True)
    ]
    return said, arrays[:3], arrays[3]


def problem_of(said: dict[str, Any], q: Any, k: Any, v: Any) -> AttentionProblem:
    return AttentionProblem(
        *(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2]),
        dtype="float16",
        causal="upper_left" if said.get("is_causal") else "none",
        scale=said.get("scale"),  # type: ignore[arg-type]
        window=(said.get("left_window_size", -1), said.get("right_window_size", -1)),
        softcap=said.get("softcap", 0.0),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_case_of_the_standard(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said, inputs, wanted = case_of(name, monkeypatch)
    for *arrays, right in zip(*inputs, wanted, strict=True):
        arrays = [np.ascontiguousarray(array, np.float16) for array in arrays]
        problem = problem_of(said, *arrays)
        for strategy in get_args(StrategyName):
            out, _ = attend_in_group(Plan(problem, strategy, ranks), *arrays)
            np.testing.assert_allclose(out.astype(float), right, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("local_window", {"window": (1, 0)}),
        ("bidirectional_window", {"window": (2, 1)}),
        ("softcap", {"softcap": 0.5}),
    ],
)
def test_another_window_or_cap_would_be_noticed(
    name: str, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, inputs, wanted = case_of(name, monkeypatch)
    arrays = [np.ascontiguousarray(array[0], np.float16) for array in inputs]
    problem = replace(problem_of(said, *arrays), **other)
    out, _ = attend_in_group(Plan(problem, "ring", 2), *arrays)
    assert np.abs(out.astype(float) - wanted[0]).max() > 4e-3
