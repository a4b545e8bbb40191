"""Attention kernels side by side on one GPU, without any exchange.

Time each distinct call of the kernel that a strategy makes on a number of ranks (one: the whole
item), by cuDNN and by FlashAttention, with results in 16 bits and in float32, in turns; medians of
events on the GPU. "cuDNN, head-major" is given arrays of [heads, tokens, dim], as PyTorch keeps
them: what is different there is the layout's. The error is that of some rows against float64; host
is what asking for a launch takes.

  mdattn bench kernels --lengths 32768,131072 --ranks 1,2
  mdattn bench kernels --lengths 524288 --head-dims 64 --ranks 4 --strategies ring,ulysses
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

from mdattn_mpi.bench.measure import report, table, versions
from mdattn_mpi.bench.options import add_rounds, add_shapes, numbers, problems
from mdattn_mpi.devices.cuda.attention import AttentionCall, Engine
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Plan
from mdattn_mpi.text import show

SECONDS = 0.1  # of one turn, roughly
FLOPS = 6e14  # by which the calls of a turn are counted
STRIDED = ("q", "k", "v", "output", "lse")
ROWS = 32  # that are compared with float64


@dataclass
class Side:
    """One kernel, made ready for one call."""

    run: Callable[[], None]
    error: float
    host: float
    times: list[float] = field(default_factory=list)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare shapes, ranks and strategies."""
    add_shapes(parser, lengths=(32768,), causal="both")
    add_rounds(parser)
    add = parser.add_argument
    add("--ranks", type=numbers, default=(1, 2), metavar="P,P", help="default: 1,2")
    add("--strategies", default="ring", metavar="NAME,NAME", help="default: ring")


def main(arguments: argparse.Namespace) -> int:
    """Measure every distinct call; print each as it is there."""
    import torch

    from mdattn_mpi.devices.cuda.open import Libraries

    libraries = Libraries()
    if absent := libraries.why_not():
        raise RejectedError(absent, fix="run it on a machine with a GPU")
    gpu = libraries.gpu(0)
    torch.cuda.set_device(0)
    engines: dict[str, Engine] = {"cudnn": libraries.cudnn(gpu)}
    missing = libraries.why_no_flash(gpu.sm)
    if not missing:
        engines["flash"] = libraries.flash(gpu)
    results = []
    for problem in problems(arguments):
        for call in calls_of(problem, arguments.ranks, arguments.strategies.split(",")):
            found = measure(call, engines, arguments.rounds)
            results.append({"call": call._asdict(), "sides": found})
            if not arguments.json:
                show(_lines(call, found))
    facts = {
        "gpu": gpu.name,
        **{name: engine.version for name, engine in engines.items()},
        **({"flash": missing} if missing else {}),
        **versions("torch"),
        "rounds": str(arguments.rounds),
    }
    for engine in engines.values():
        engine.close()
    report({"results": results}, (), facts, as_json=arguments.json)
    return 0


def calls_of(
    problem: AttentionProblem, ranks: tuple[int, ...], strategies: list[str]
) -> dict[AttentionCall, None]:
    """Return each distinct call that rank 0 makes of the kernel, as a set in order."""
    from mdattn_mpi.devices.cuda.kernels import plain_call
    from mdattn_mpi.devices.cuda.packing import Run
    from mdattn_mpi.strategies import STRATEGIES
    from mdattn_mpi.strategies.rehearsal import rehearse

    found: dict[AttentionCall, None] = {}
    for size in ranks:
        for name, attend in STRATEGIES.items():
            if name in strategies:
                for call in rehearse(attend, Plan(problem, name, size), 0):
                    heads = call.q_heads, call.kv_heads
                    for block in call.blocks:
                        found[plain_call(problem, *heads, Run((block,), block.band))] = None
    return found


def measure(
    call: AttentionCall, engines: Mapping[str, Engine], rounds: int
) -> dict[str, dict[str, float]]:
    """Time all sides in turn: milliseconds, TFLOP/s, microseconds of the host, and errors."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sides = dict(sides_of(call, engines, stream))
        calls = max(2, min(200, int(SECONDS * FLOPS / flops_of(call))))
        for turn in range(rounds * len(sides)):
            lap, place = divmod(turn, len(sides))
            side = list(sides.values())[(lap + place) % len(sides)]
            side.run()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                side.run()
            end.record()
            end.synchronize()
            side.times.append(begin.elapsed_time(end) / calls)
    return {
        name: {
            "ms": median(side.times),
            "TFLOP/s": flops_of(call) / median(side.times) / 1e9,
            "host": side.host,
            "error": side.error,
        }
        for name, side in sides.items()
    }


def sides_of(
    call: AttentionCall, engines: Mapping[str, Engine], stream: Any
) -> Iterator[tuple[str, Side]]:
    """Make ready what can do the call."""
    import torch

    torch.manual_seed(3)
    q, k, v = (
        torch.randn(*shape, device="cuda", dtype=getattr(torch, call.dtype))
        for shape in (
            (call.q_tokens, call.q_heads, call.head_dim),
            (call.kv_tokens, call.kv_heads, call.head_dim),
            (call.kv_tokens, call.kv_heads, call.v_head_dim),
        )
    )
    rows = torch.linspace(0, call.q_tokens - 1, ROWS).long().to(q.device)
    right = reference(call, q, k, v, rows)
    shape = (call.q_tokens, call.q_heads, call.v_head_dim)
    for name, engine, out_dtype, head_major in (
        ("cuDNN", engines["cudnn"], call.dtype, False),
        ("cuDNN, head-major", engines["cudnn"], call.dtype, True),
        ("flash", engines.get("flash"), call.dtype, False),
        ("flash, float32", engines.get("flash"), "float32", False),
    ):
        if engine is None:
            continue
        output = torch.empty(shape, device="cuda", dtype=getattr(torch, out_dtype))
        lse = torch.empty(shape[:2], device="cuda")
        arrays = [q, k, v, output, lse]
        if head_major:
            arrays = [array.transpose(0, 1).contiguous().transpose(0, 1) for array in arrays]
        strides = dict(zip(STRIDED, (array.stride() for array in arrays), strict=True))
        wanted = call._replace(out_dtype=out_dtype, **strides)
        if engine.refusal(wanted):
            continue
        launch = engine.prepare(wanted)
        workspace = torch.empty(max(1, launch.workspace), device="cuda", dtype=torch.uint8)
        run = launcher(launch, arrays, workspace, stream)
        run()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            run()
        host = (time.perf_counter() - began) * 1e5
        torch.cuda.synchronize()
        found = arrays[3][rows].double()
        yield name, Side(run, float((found - right).norm() / right.norm()), host)


def launcher(launch: Any, arrays: list[Any], workspace: Any, stream: Any) -> Callable[[], None]:
    """Return what launches on PyTorch's stream."""
    addresses = tuple(array.data_ptr() for array in arrays)
    where = SimpleNamespace(handle=stream.cuda_stream)
    keep = (arrays, workspace)  # as long as it may be called

    def run() -> None:
        launch.run(addresses, keep[1].data_ptr(), where)

    return run


def reference(call: AttentionCall, q: Any, k: Any, v: Any, rows: Any) -> Any:
    """Some rows of the output, in float64."""
    import torch

    group, heads = call.q_heads // call.kv_heads, []
    for head in range(call.q_heads):
        scores = q[rows, head].double() @ k[:, head // group].double().T * call.scale
        if call.softcap:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        keys = torch.arange(call.kv_tokens, device=q.device)
        after = keys[None] - rows[:, None] - (call.kv_tokens - call.q_tokens)  # of the diagonal
        if call.band.after is not None:
            scores[after > call.band.after] = -torch.inf
        if call.band.before is not None:
            scores[after < -call.band.before] = -torch.inf
        heads.append(scores.softmax(-1) @ v[:, head // group].double())
    return torch.stack(heads, 1)


def flops_of(call: AttentionCall) -> int:
    """Floating-point operations of the two matrix products."""
    pairs = call.band.pairs(call.q_tokens, call.kv_tokens)
    return 2 * pairs * call.q_heads * (call.head_dim + call.v_head_dim)


def _lines(call: AttentionCall, sides: Mapping[str, Mapping[str, float]]) -> str:
    """A table of one call."""
    first = sides["cuDNN"]["ms"] if "cuDNN" in sides else float("nan")
    mask = {"none": "full", "causal": "lower right"}.get(call.mask, str(call.band))
    title = (
        f"{call.q_tokens} × {call.kv_tokens} tokens, {call.q_heads}/{call.kv_heads} heads of "
        f"{call.head_dim}, {call.dtype}, {mask}"
    )
    rows = [("", "ms", "TFLOP/s", "cuDNN's / it", "error", "host, us")]
    rows += [
        (
            name,
            f"{found['ms']:.4f}",
            f"{found['TFLOP/s']:.0f}",
            f"{first / found['ms']:.3f}",
            f"{found['error']:.2e}",
            f"{found['host']:.1f}",
        )
        for name, found in sides.items()
    ]
    return "\n".join([title, *table(rows), ""])
