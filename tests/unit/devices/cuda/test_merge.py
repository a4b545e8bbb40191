"""The merge kernel itself, compiled for the host: its arithmetic, and how it finds its rows."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.merge import SLOTS, MergeCall, Part

COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler: apt install g++")

HEADS, DIM = 3, 16
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

# Threads run one after the other, that of lane 0 last: it is the one that replaces the LSE.
STAND_INS = """
#include <cmath>
#include <cstring>
#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)
static struct Index { long x, y; } blockIdx, blockDim, threadIdx;
static float bits(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned x) { return bits(x); }
static float __int_as_float(int x) { return bits((unsigned)x); }
static void __syncthreads() {}
static unsigned short to_bfloat16(float x) {
  unsigned y; std::memcpy(&y, &x, 4);
  return (unsigned short)((y + 0x7fff + ((y >> 16) & 1)) >> 16);
}
"""
RUN = """
extern "C" void run(const Call* call, long grid, long lanes, long places) {
  blockDim = {lanes, places};
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (threadIdx.y = 0; threadIdx.y < places; ++threadIdx.y)
      for (threadIdx.x = lanes - 1; threadIdx.x >= 0; --threadIdx.x) merge(*call);
}
"""
Kernel = Callable[[MergeCall], None]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    folder, compiled = tmp_path_factory.mktemp("merge"), dict[str, Any]()

    def run(call: MergeCall) -> None:
        if call.kernel not in compiled:
            compiled[call.kernel] = compile_for_host(call, folder / f"{len(compiled)}.so")
        words = call.words
        struct = (ctypes.c_int64 * len(words))(*words)
        compiled[call.kernel](struct, *map(ctypes.c_long, (call.grid, *call.block)))

    return run


def compile_for_host(call: MergeCall, library: Path) -> Any:
    source = call.source
    rounding = re.compile(r'asm\("cvt\.rn\.bf16\.f32[^;]*;"[^;]*;')
    assert rounding.search(source)
    source = rounding.sub("y.bits = to_bfloat16(x);", source)
    source = re.sub(r'asm\("cvt[^;]*;"[^;]*;', "", source)  # float16 is left to the GPU
    text = library.with_suffix(".cpp")
    text.write_text(STAND_INS + source + RUN)
    command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", library, text]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(library)).run


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


@st.composite
def merges(
    draw: st.DrawFn,
) -> tuple[int, list[tuple[int, int]], tuple[int, int], bool, str, int]:
    """Rows in all, the rows of each part, those to merge, whether to fold, what, and a seed."""
    rows = draw(st.integers(1, 40))

    def run() -> tuple[int, int]:
        start = draw(st.integers(0, rows))
        return start, draw(st.integers(start, rows))

    parts = [run() for _ in range(draw(st.integers(0, SLOTS[-1])))]
    kind = draw(st.sampled_from(["bfloat16", "float32"]))
    return rows, parts, run(), draw(st.booleans()), kind, draw(st.integers(0, 2**32 - 1))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(merges())
def test_the_kernel_merges(
    kernel: Kernel, case: tuple[int, list[tuple[int, int]], tuple[int, int], bool, Any, int]
) -> None:
    rows, spans, (start, stop), fold, kind, seed = case
    random = np.random.default_rng(seed)
    target = NUMPY["float32" if fold else "bfloat16"]
    results = []
    for first, last in spans:
        value = random.standard_normal((last - first, HEADS, DIM)).astype(NUMPY[kind])
        log = random.normal(0, 20, (last - first, HEADS)).astype(np.float32)
        log[random.random(log.shape) < 0.2] = -np.inf  # rows that saw no key
        value[np.isneginf(log)] = np.nan  # whose output may be anything
        results.append((first, last, value, log))
    output = np.full((rows, HEADS, DIM), 7, target)
    lse = np.full((rows, HEADS), 7, np.float32)
    if fold:
        output[:] = random.standard_normal(output.shape)
        lse[:] = random.normal(0, 20, lse.shape)
        results.append((0, rows, output.copy(), lse.copy()))
    before = output.copy(), lse.copy()
    running = (address(output), address(lse)) if fold else (0, 0)
    sinks = random.normal(0, 20, HEADS).astype(np.float32) if seed % 2 else None
    if sinks is not None:
        zeros = np.zeros((rows, HEADS, DIM), np.float32)
        results.append((0, rows, zeros, np.tile(sinks, (rows, 1))))
    parts = [Part(address(v), address(e), a, z) for a, z, v, e in results[: len(spans)]]
    name = "float32" if fold else "bfloat16"
    kernel(
        MergeCall(
            kind,
            name,
            address(output),
            address(lse),
            start,
            stop,
            HEADS,
            DIM,
            parts,
            *running,  # type: ignore[arg-type]
            sinks=0 if sinks is None else address(sinks),
        )
    )
    wanted, wanted_lse = reference(rows, results)
    inside = slice(start, stop)
    np.testing.assert_allclose(lse[inside], wanted_lse[inside], rtol=1e-5, atol=1e-5)
    close = {"rtol": 1e-4, "atol": 1e-5} if fold else {"rtol": 2**-8, "atol": 1e-3}
    np.testing.assert_allclose(output[inside].astype(float), wanted[inside], **close)
    for array, old in zip((output, lse), before, strict=True):  # and nothing else is touched
        np.testing.assert_array_equal(array[:start], old[:start])
        np.testing.assert_array_equal(array[stop:], old[stop:])


def reference(
    rows: int, results: list[tuple[int, int, Any, Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In float64."""
    logs = np.full((len(results) + 1, rows, HEADS), -np.inf)
    values = np.zeros((len(results) + 1, rows, HEADS, DIM))
    for index, (first, last, value, log) in enumerate(results):
        logs[index, first:last] = log
        values[index, first:last] = np.where(np.isneginf(log)[..., None], 0, value.astype(float))
    whole = np.logaddexp.reduce(logs)
    weights = np.exp(logs - np.where(np.isneginf(whole), 0, whole))
    return (weights[..., None] * values).sum(0), whole
