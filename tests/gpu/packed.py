"""Packed documents on one GPU: one call of FlashAttention against one a document.

    python tests/gpu/packed.py

Errors are against float64, with the same without documents as the control. Exit code 1 where one is
wrong.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from mdattn_mpi.devices.cuda.open import open_cuda
from mdattn_mpi.lockstep import start
from mdattn_mpi.mask import UNBOUNDED, Span
from mdattn_mpi.partition import blocks
from mdattn_mpi.problem import AttentionProblem
from tests.gpu.problems import TOLERANCE, inputs, others, reference

CALLS = 40


def problem_of(tokens: int, documents: int, window: tuple[int, int]) -> AttentionProblem:
    """Documents of long-tailed lengths, from one token on."""
    random = np.random.default_rng(documents)
    lengths = random.lognormal(0, 1, documents)
    cuts = np.unique((lengths.cumsum() / lengths.sum() * tokens).astype(int)[:-1])
    starts = (0, *(int(cut) for cut in cuts if cut))
    return AttentionProblem(
        tokens, tokens, 8, 2, 128, 128, "bfloat16", "upper_left", window=window, segments=starts
    )


def check(device: Any, problem: AttentionProblem) -> int:
    """Print errors and times of both ways; count what is wrong."""
    arrays = inputs(problem, np.random.default_rng(1))
    right = reference(problem, *arrays)[0]
    q, k, v = map(device.upload, arrays)
    sequence = (Span(0, problem.q_tokens),)
    found = blocks(sequence, sequence, problem.mask)
    is_for_many = device.kernels._is_for_many
    wrong = 0

    def call() -> Any:
        accumulator = device.accumulator(q, 128, problem.scale)
        device.attend(accumulator, found, k, v)
        return device.finish(accumulator)

    for name, split in (("one call", is_for_many), ("a call each", lambda run, _: run.blocks[1:])):
        device.kernels._is_for_many = split
        made = len(device.kernels._launches._ready)
        out = device.download(*call()).wait()[0].astype(float)
        made = len(device.kernels._launches._ready) - made
        error = np.linalg.norm(out - right) / np.linalg.norm(right)
        begin, marks = time.perf_counter(), []
        for _ in range(CALLS):
            call()
            marks.append(device.mark())
        host = (time.perf_counter() - begin) / CALLS * 1e3
        marks[-1].sync()
        took = median(later - earlier for earlier, later in pairwise(marks[5:]))
        print(f"  {name}: {made} kinds of calls, {took:.3f} ms, host {host:.3f} ms, {error:.2e}")
        wrong += not error < TOLERANCE[problem.dtype]
    device.kernels._is_for_many = is_for_many
    for other in others(problem):
        apart = np.linalg.norm(reference(other, *arrays)[0] - right) / np.linalg.norm(right)
        wrong += not apart > 10 * TOLERANCE[problem.dtype]
        print(f"  control, window {other.window}, {len(other.segments)} documents: {apart:.2e}")
    return wrong


def main() -> int:
    """Check and time; return the exit code."""
    world, wrong = start(), 0
    device = open_cuda(world, kernel="flash")
    for tokens, documents, window in (
        (8192, 64, UNBOUNDED), (8192, 64, (100, 0)), (8192, 512, UNBOUNDED), (777, 9, UNBOUNDED),
    ):  # fmt: skip
        problem = problem_of(tokens, documents, window)
        print(f"{tokens} tokens, {len(problem.segments)} documents, window {window}")
        wrong += check(device, problem)
    device.close()
    world.end()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
