"""The CPU's side of ``mdattn bench attention``: NumPy against PyTorch on the same cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import alternate, report
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.problem import AttentionProblem, Span

if TYPE_CHECKING:
    from mdattn_mpi.devices.cpu.host import Array, HostDevice

PAUSE = 0.01  # seconds between runs: PyTorch's threads spin for a while after they are done


@dataclass(frozen=True)
class Result:
    """Medians in seconds; `ratio` is PyTorch's over ours.

    ``numpy_exp`` is of our engine with NumPy's exp, whatever is installed.
    """

    problem: AttentionProblem
    ours: float
    theirs: float
    numpy_exp: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours

    @property
    def exp_gain(self) -> float:
        """How many times faster the exp that is used makes it than NumPy's."""
        return self.numpy_exp / self.ours

    def __str__(self) -> str:
        gflops = self.problem.flops / 1e9
        return (
            f"{self.problem}: ours {self.ours * 1e3:.1f} ms ({gflops / self.ours:.0f} GFLOP/s), "
            f"PyTorch {self.theirs * 1e3:.1f} ms ({gflops / self.theirs:.0f}), "
            f"ratio {self.ratio:.2f}; exp gains {self.exp_gain:.2f}"
        )


def main(problems: Sequence[AttentionProblem], rounds: int, *, as_json: bool) -> None:
    """Measure every problem with as many threads as there are cores."""
    torch = _torch()
    from mdattn_mpi.devices.cpu.exponential import numpy_exp
    from mdattn_mpi.devices.cpu.host import HostDevice, libraries, processor

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    devices = HostDevice(0, 1, threads), HostDevice(0, 1, threads, numpy_exp())
    results = []
    for problem in problems:
        kinds = sides(*devices, torch, problem)
        took = alternate(kinds, rounds, before=partial(time.sleep, PAUSE))
        results.append(Result(problem, **took))
        if not as_json:
            print(results[-1], flush=True)
    causal = causal_cost(results)
    mean = geometric_mean(result.ratio for result in results)
    exp_gain = geometric_mean(result.exp_gain for result in results)
    figures = {
        "results": [
            {
                **asdict(r.problem),
                "ours": r.ours,
                "theirs": r.theirs,
                "ratio": r.ratio,
                "exp_gain": r.exp_gain,
            }
            for r in results
        ],
        "geometric_mean": mean,
        "exp_gain": exp_gain,
        "causal_cost": causal,
    }
    rows = [
        ("geometric mean of the ratios", f"{mean:.3f}"),
        ("the same of our time with NumPy's exp over ours", f"{exp_gain:.3f}"),
        *((f"our causal time / full, {where}", f"{cost:.2f}") for where, cost in causal.items()),
    ]
    facts = {
        "processor": processor(),
        "threads": str(threads),
        **libraries(),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "rounds": str(rounds),
    }
    report(figures, rows, facts, as_json=as_json)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RejectedError(
            f"PyTorch can't be imported ({error})", fix="pip install 'mdattn_mpi[bench]'"
        ) from None
    return torch


def causal_cost(results: Sequence[Result]) -> dict[str, float]:
    """Our time with a causal mask as a share of that without, for everything that has both."""
    full = {_but_mask(r.problem): r.ours for r in results if r.problem.causal == "none"}
    return {
        where: r.ours / full[where]
        for r in results
        if r.problem.causal != "none" and (where := _but_mask(r.problem)) in full
    }


def _but_mask(problem: AttentionProblem) -> str:
    return f"S={problem.q_tokens} H={problem.head_dim} {problem.dtype}"


def sides(
    ours: HostDevice, with_numpy_exp: HostDevice, torch: Any, problem: AttentionProblem
) -> dict[str, Callable[[], Any]]:
    """Functions that compute the same attention of the same random inputs, on devices and PyTorch.

    Raises
    ------
    DeviceError
        Their results differ.

    """
    import numpy as np

    from mdattn_mpi.dataset import NUMPY

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

    def attend(device: HostDevice) -> Array:
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
        attend(ours).astype(np.float32) - theirs()[0].transpose(0, 1).to(torch.float32).numpy()
    ).max()
    if not difference < 0.05:  # both round to 16 bits; random values of order 1
        raise DeviceError(f"ours and PyTorch's differ by {difference} for {problem}")
    return {
        "ours": partial(attend, ours),
        "theirs": theirs,
        "numpy_exp": partial(attend, with_numpy_exp),
    }
