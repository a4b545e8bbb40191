"""The CPU's side of ``mdattn bench attention``: NumPy against PyTorch on the same cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from mdattn_mpi.bench.attention import Arena, Contest
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.problem import AttentionProblem, Span

PAUSE = 0.01  # seconds between runs: PyTorch's threads spin for a while after they are done


def arena(threads: int) -> Arena:
    """Open both engines with the same number of threads."""
    try:
        import torch
    except ImportError as error:
        raise RejectedError(
            f"PyTorch can't be imported ({error})", fix="pip install 'mdattn_mpi[bench]'"
        ) from None
    from mdattn_mpi.devices.cpu.host import HostDevice, libraries, processor

    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    device = HostDevice(0, 1, threads)
    facts = {
        "processor": processor(),
        "threads": str(threads),
        **libraries(),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
    }
    return Arena(lambda problem: _contest(device, torch, problem), facts)


def _contest(device: Any, torch: Any, problem: AttentionProblem) -> Contest:
    import ml_dtypes
    import numpy as np

    dtype = getattr(torch, problem.dtype)
    host = np.dtype(ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else np.float16)
    shapes = (
        (problem.q_heads, problem.q_tokens, problem.head_dim),
        (problem.kv_heads, problem.kv_tokens, problem.head_dim),
        (problem.kv_heads, problem.kv_tokens, problem.v_head_dim),
    )
    # Each side gets the order that it is made for: [1, N, S, H] there, [S, N, H] here.
    tensors = [torch.randn(1, *shape).to(dtype) for shape in shapes]
    q, k, v = (
        tensor[0].transpose(0, 1).contiguous().view(torch.int16).numpy().view(host)
        for tensor in tensors
    )

    def ours() -> Any:
        accumulator = device.accumulator(q, problem.v_head_dim, problem.scale)
        device.attend(accumulator, Span(0, len(q)), k, v, problem.causal != "none")
        return device.finish(accumulator)[0]

    def theirs() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            *tensors,
            is_causal=problem.causal != "none",
            scale=problem.scale,
            enable_gqa=problem.group_heads > 1,
        )

    difference = np.abs(
        ours().astype(np.float32) - theirs()[0].transpose(0, 1).to(torch.float32).numpy()
    ).max()
    if not difference < 0.05:  # both round to 16 bits; random values of order 1
        raise DeviceError(f"ours and PyTorch's differ by {difference} for {problem}")
    return Contest(_timed(ours), _timed(theirs))


def _timed(run: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        time.sleep(PAUSE)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds
