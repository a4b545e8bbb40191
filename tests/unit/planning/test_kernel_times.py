"""Measured times of kernels, from the files of both benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.planning.kernel_times import read_kernel_times
from mdattn_mpi.problem import AttentionProblem

H200 = str(Path(__file__).parents[3] / "docs" / "h200-kernels.json")
FULL = AttentionProblem(32768, 32768, 8, 8, 128, 128)


def kernels(tmp_path: Path, *calls: tuple[int, int, list[int | None], dict[str, float]]) -> str:
    """A file as ``bench kernels --json`` prints it: query and kv tokens, band, TFLOP/s by side."""
    results = [
        {
            "call": {"q_tokens": q, "kv_tokens": kv, "head_dim": 128, "band": band},
            "sides": {name: {"ms": 1.0, "TFLOP/s": flops} for name, flops in sides.items()},
        }
        for q, kv, band, sides in calls
    ]
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"results": results, "facts": {"gpu": "H100"}}))
    return str(path)


def test_what_bench_predict_keeps() -> None:
    """One GPU computes 32k tokens in 7.3 ms, and causal 128k in 63.3 (docs/performance.md)."""
    times = read_kernel_times(H200, "cudnn")
    assert FULL.flops / times.flops(FULL, 1) == pytest.approx(7.3e-3, rel=0.1)
    causal = AttentionProblem(131072, 131072, 8, 8, 128, 128, causal="upper_left")
    assert causal.flops / times.flops(causal, 1) == pytest.approx(63.3e-3, rel=0.1)


def test_the_call_that_is_most_alike_counts(tmp_path: Path) -> None:
    full: list[int | None] = [None, None]
    times = read_kernel_times(
        kernels(
            tmp_path,
            (32768, 32768, full, {"cuDNN": 600}),
            (4096, 32768, full, {"cuDNN": 500}),
            (2048, 2048, full, {"cuDNN": 300}),
            (32768, 32768, [None, 0], {"cuDNN": 550}),
        ),
        "cudnn",
    )
    short = AttentionProblem(2000, 2000, 8, 8, 128, 128)
    causal = AttentionProblem(2000, 2000, 8, 8, 128, 128, causal="upper_left")
    found = [times.flops(*call) for call in ((FULL, 1), (FULL, 8), (short, 1), (causal, 1))]
    assert found == [600e12, 500e12, 300e12, 550e12]


def test_each_kernel_has_its_own_times(tmp_path: Path) -> None:
    sides = {"cuDNN": 600.0, "cuDNN, head-major": 610.0, "flash": 700.0, "flash, float32": 690.0}
    path = kernels(tmp_path, (32768, 32768, [None, None], sides))
    assert read_kernel_times(path, "cudnn").flops(FULL, 1) == 600e12
    assert read_kernel_times(path, "flash").flops(FULL, 1) == 690e12


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"results": [{}]}', '{"attend": [{"call": [1, 2]}]}', '{"results": 1}'],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(RejectedError, match=r"kernel times|no times") as caught:
        read_kernel_times(str(path), "cudnn")
    assert caught.value.file == str(path)
    assert "mdattn bench kernels --json" in caught.value.fix
