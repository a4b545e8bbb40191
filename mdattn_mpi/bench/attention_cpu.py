"""The CPU's side of ``mdattn bench attention``: NumPy against PyTorch on the same cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import alternate, report
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.mask import UNBOUNDED, Mask, Span
from mdattn_mpi.partition import blocks
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.text import install, show

if TYPE_CHECKING:
    from mdattn_mpi.devices.cpu.host import Array, HostDevice

PAUSE = 0.01  # seconds between runs: PyTorch's threads spin for a while after they are done


Row = dict[str, Any]  # of a problem: its facts, medians in seconds, and what follows from them


def main(problems: Sequence[AttentionProblem], rounds: int, *, as_json: bool) -> None:
    """Measure every problem with as many threads as there are cores."""
    torch = _torch()
    from mdattn_mpi.devices.cpu.exponential import numpy_exp
    from mdattn_mpi.devices.cpu.host import HostDevice, libraries, processor

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    devices = HostDevice(0, 1, threads), HostDevice(0, 1, threads, numpy_exp())
    results: list[Row] = []
    for problem in problems:
        took = alternate(sides(*devices, torch, problem), rounds, before=partial(time.sleep, PAUSE))
        unmasked = took.pop("unmasked", None)
        gains = {
            "ratio": took["theirs"] / took["ours"],  # above 1, ours is faster
            "exp_gain": took.pop("numpy_exp") / took["ours"],
        }
        if unmasked:
            gains["mask_cost"] = took["ours"] / unmasked
        results.append({**asdict(problem), **took, **gains})
        if not as_json:
            show(_line(problem, results[-1]))
    figures = {
        "results": results,
        "geometric_mean": geometric_mean(row["ratio"] for row in results),
        "exp_gain": geometric_mean(row["exp_gain"] for row in results),
        "causal_cost": causal_cost(results),
    }
    rows = [
        ("geometric mean of the ratios", f"{figures['geometric_mean']:.3f}"),
        ("the same of our time with NumPy's exp over ours", f"{figures['exp_gain']:.3f}"),
        *(
            (f"our causal time / full, {where}", f"{cost:.2f}")
            for where, cost in causal_cost(results).items()
        ),
    ]
    facts = {
        "processor": processor(),
        "threads": str(threads),
        **libraries(),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "rounds": str(rounds),
    }
    report(figures, rows, facts, as_json=as_json)


def _line(problem: AttentionProblem, row: Row) -> str:
    gflops = problem.flops / 1e9
    return (
        f"{problem}: ours {row['ours'] * 1e3:.1f} ms ({gflops / row['ours']:.0f} GFLOP/s), "
        f"PyTorch {row['theirs'] * 1e3:.1f} ms ({gflops / row['theirs']:.0f}), "
        f"ratio {row['ratio']:.2f}; exp gains {row['exp_gain']:.2f}"
        + (f"; {row['mask_cost']:.3f} of our time without any mask" if "mask_cost" in row else "")
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RejectedError(f"PyTorch can't be imported ({error})", fix=install("bench")) from None
    return torch


def causal_cost(results: Sequence[Row]) -> dict[str, float]:
    """Our time with a causal mask as a share of that without, for everything that has both."""
    ours: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for row in results:
        where = f"S={row['q_tokens']} H={row['head_dim']} {row['dtype']}"
        ours[row["causal"] != "none"][where] = row["ours"]
    full, causal = ours[False], ours[True]
    return {where: causal[where] / full[where] for where in causal if where in full}


def sides(
    ours: HostDevice, with_numpy_exp: HostDevice, torch: Any, problem: AttentionProblem
) -> dict[str, Callable[[], Any]]:
    """Functions that compute the same attention of the same random inputs, on devices and PyTorch.

    And ours without any mask, where there is a window.

    Raises
    ------
    DeviceError
        Their results differ.

    """
    import numpy as np

    from mdattn_mpi.dataset import NUMPY
    from mdattn_mpi.verifier.visible import visible

    dtype = getattr(torch, problem.dtype)
    shapes = (
        (problem.q_heads, problem.q_tokens, problem.head_dim),
        (problem.kv_heads, problem.kv_tokens, problem.head_dim),
        (problem.kv_heads, problem.kv_tokens, problem.v_head_dim),
    )
    # Each side gets the order that it is made for: [1, N, S, H] there, [S, N, H] here.
    tensors = [torch.randn(1, *shape).to(dtype) for shape in shapes]
    q, k, v = (
        tensor[0].transpose(0, 1).contiguous().view(torch.int16).numpy().view(NUMPY[problem.dtype])
        for tensor in tensors
    )

    def attend(device: HostDevice, mask: Mask = problem.mask) -> Array:
        accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, problem.softcap)
        device.attend(accumulator, blocks((Span(0, len(q)),), (Span(0, len(k)),), mask), k, v)
        return device.finish(accumulator)[0]

    seen = None
    if problem.window != UNBOUNDED:
        keys = torch.arange(len(k))
        first, last = map(torch.from_numpy, visible(problem, np.arange(len(q))))
        seen = (keys >= first[:, None]) & (keys <= last[:, None])

    def theirs() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            *tensors,
            attn_mask=seen,
            is_causal=seen is None and problem.causal != "none",
            scale=problem.scale,
            enable_gqa=problem.group_heads > 1,
        )

    difference = np.abs(
        attend(ours).astype(np.float32) - theirs()[0].transpose(0, 1).to(torch.float32).numpy()
    ).max()
    if not difference < 0.05:  # both round to 16 bits; random values of order 1
        raise DeviceError(f"ours and PyTorch's differ by {difference} for {problem}")
    found: dict[str, Callable[[], Any]] = {
        "ours": partial(attend, ours),
        "theirs": theirs,
        "numpy_exp": partial(attend, with_numpy_exp),
    }
    return found if seen is None else {**found, "unmasked": partial(attend, ours, Mask())}
