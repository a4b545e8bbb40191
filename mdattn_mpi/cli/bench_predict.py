"""``mdattn bench predict``: what more ranks would take, from kernel times of one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mdattn_mpi.cli.bench import numbers, surroundings, table

if TYPE_CHECKING:
    from mdattn_mpi.devices.timeline import Call, Rates
    from mdattn_mpi.lockstep import World
    from mdattn_mpi.problem import Plan

DESCRIPTION = """\
Predict the share of ideal, t(1) / (P · t(P)), of every strategy on P ranks. The strategies' own
code runs in virtual time; what an attention call, a link and the memory take is measured here once
and kept in a file. With two ranks or more, the links are measured too.

  mpirun -n 2 mdattn bench predict -b cuda --kernels h200.json --ranks 2,4,8
  mdattn bench predict --kernels h200.json --ranks 16      nothing is measured that is in the file
"""

STREAM = 8  # items of a batch
LINK_BYTES = 1 << 26
SMALL_BYTES = 1 << 12
SHORTEST = 0.005  # seconds that a timed burst lasts
ROUNDS = 3


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "predict",
        help="what more ranks would take, from kernel times of one",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kernels", required=True, metavar="FILE", help="measured times, read and completed")
    add("-b", "--backend", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--ranks", type=numbers, default=(2, 4, 8), metavar="P,P", help="default: 2,4,8")
    add("--lengths", type=numbers, default=(8192, 32768, 131072), metavar="S,S", help="tokens")
    add("--per-rank", action="store_true", help="lengths are tokens a rank (weak scaling)")
    add("--q-heads", type=int, default=8, metavar="N", help="default: 8")
    add("--kv-heads", type=int, default=8, metavar="N", help="default: 8")
    add("--head-dim", type=int, default=128, metavar="H", help="default: 128")
    add("--causal", choices=("none", "upper_left", "both"), default="both", help="default: both")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure what the file lacks, then predict."""
    from mdattn_mpi.lockstep import watch

    return watch(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.devices.timeline import calls, trace
    from mdattn_mpi.lockstep import start
    from mdattn_mpi.strategies import STRATEGIES

    with start() as world:
        plans = list(_plans(arguments))
        kernels = _load(world, arguments.kernels)
        needed = {
            call
            for plan in plans
            for one in (plan, _alone(plan))
            for call in calls(trace(one, STRATEGIES[one.strategy]))
        }
        if missing := sorted(needed - kernels.attend.keys()):
            kernels = _measure(world, arguments, kernels, missing)
            _save(world, arguments.kernels, kernels)
        if world.rank == 0:
            rows = [_predict(plan, kernels) for plan in plans]
            facts = surroundings()
            print(json.dumps({"rows": rows, **facts}) if arguments.json else _table(rows, facts))
    return 0


def _plans(arguments: argparse.Namespace) -> Iterator[Plan]:
    from mdattn_mpi.problem import AttentionProblem, Causal, Plan
    from mdattn_mpi.strategies import STRATEGIES

    both: tuple[Causal, ...] = ("none", "upper_left")
    masks = both if arguments.causal == "both" else (arguments.causal,)
    heads = (arguments.q_heads, arguments.kv_heads)
    for length in arguments.lengths:
        for causal in masks:
            for ranks in arguments.ranks:
                tokens = length * ranks if arguments.per_rank else length
                dims = (arguments.head_dim, arguments.head_dim)
                problem = AttentionProblem(tokens, tokens, *heads, *dims, causal=causal)
                for name in STRATEGIES:
                    yield Plan(problem, name, ranks)


def _alone(plan: Plan) -> Plan:
    from mdattn_mpi.problem import Plan

    return Plan(plan.problem, "ring", 1)


def _predict(plan: Plan, rates: Rates) -> dict[str, Any]:
    """Play one plan as a single item and as a batch."""
    from mdattn_mpi.devices.timeline import simulate, trace
    from mdattn_mpi.strategies import STRATEGIES

    def seconds(items: int) -> float:
        return simulate(trace(plan, STRATEGIES[plan.strategy], items), rates)

    alone = simulate(trace(_alone(plan), STRATEGIES["ring"]), rates)
    one, batch = seconds(1), seconds(STREAM)
    each = (batch - one) / (STREAM - 1)
    problem = plan.problem
    return {
        "tokens": problem.q_tokens,
        "heads": f"{problem.q_heads}/{problem.kv_heads}",
        "mask": "full" if problem.causal == "none" else "causal",
        "ranks": plan.ranks,
        "strategy": plan.strategy,
        "alone_seconds": alone,
        "seconds": one,
        "share": alone / (plan.ranks * one),
        "batch_share": alone / (plan.ranks * each),
    }


def _table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    head = ("S", "N", "mask", "P", "strategy", "ms", "share", "in a batch")
    body = [
        (
            str(row["tokens"]),
            row["heads"],
            row["mask"],
            str(row["ranks"]),
            row["strategy"],
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['share']:.3f}",
            f"{row['batch_share']:.3f}",
        )
        for row in rows
    ]
    return "\n".join([table([head, *body]), *(f"{key}: {value}" for key, value in facts.items())])


# -- measured times, in a file ---------------------------------------------------------------------


def _load(world: World, path: str) -> Rates:
    """Collective. Read what was measured before; nothing if there is no file."""
    from mdattn_mpi.devices.timeline import Call, Rates

    text = b""
    if world.rank == 0 and Path(path).exists():
        text = Path(path).read_bytes()
    found = json.loads(world.bcast_bytes(text) or "{}")
    times = {Call(*each["call"]): each["seconds"] for each in found.get("attend", ())}
    return Rates(
        times, found.get("bandwidth", 0.0), found.get("latency", 0.0), found.get("memory", 0.0)
    )


def _save(world: World, path: str, rates: Rates) -> None:
    if world.rank == 0:
        found = {
            "bandwidth": rates.bandwidth,
            "latency": rates.latency,
            "memory": rates.memory,
            "attend": [{"call": call, "seconds": time} for call, time in rates.attend.items()],
            **surroundings(),
        }
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


# -- measuring -------------------------------------------------------------------------------------


def _measure(
    world: World, arguments: argparse.Namespace, known: Rates, missing: Sequence[Call]
) -> Rates:
    """Collective. Time the calls that are missing on every rank; the links where there are any."""
    from mdattn_mpi.backends import open_backend
    from mdattn_mpi.devices.timeline import Rates

    backend = open_backend(arguments.backend, world, threads=arguments.threads)
    device = backend.device  # type: ignore[attr-defined]
    times = dict(known.attend)
    for call in missing:
        times[call] = _attend_seconds(device, call)
        world.barrier()
    bandwidth, latency = known.bandwidth, known.latency
    if world.size > 1:
        large = _exchange_seconds(device, LINK_BYTES)
        latency = _exchange_seconds(device, SMALL_BYTES)
        bandwidth = LINK_BYTES / max(large - latency, 1e-9)
    memory = known.memory or _copied_bytes_a_second(device)
    backend.close()
    return Rates(times, bandwidth or float("inf"), latency, memory)


def _random(device: Any, shape: tuple[int, ...]) -> Any:
    import ml_dtypes
    import numpy as np

    # The same million numbers again and again: drawing them all would take longer than measuring.
    some = np.random.default_rng().standard_normal(1 << 20, np.float32)
    return device.upload(np.resize(some.astype(ml_dtypes.bfloat16), shape))


def _attend_seconds(device: Any, call: Call) -> float:
    """Time one attention call on random data."""
    from mdattn_mpi.problem import Span

    q = _random(device, (call.q_rows, call.q_heads, call.head_dim))
    k = _random(device, (call.kv_rows, call.kv_heads, call.head_dim))
    v = _random(device, (call.kv_rows, call.kv_heads, call.v_head_dim))

    def once() -> Any:
        accumulator = device.accumulator(q, call.v_head_dim, call.head_dim**-0.5)
        device.attend(accumulator, Span(0, call.q_rows), k, v, call.causal)
        return device.finish(accumulator)[1]

    return _seconds(device, once)


def _exchange_seconds(device: Any, nbytes: int) -> float:
    """Time a message to the next rank while one comes from the rank before."""
    from mdattn_mpi.devices.protocol import Message

    there = _random(device, (nbytes // 2, 1, 1))
    here = device.empty(there.shape, there)
    after, before = (device.rank + 1) % device.ranks, (device.rank - 1) % device.ranks

    def once() -> Any:
        device.wait(device.exchange([Message(there, after)], [Message(here, before)]))
        return here[:1]

    return _seconds(device, once, fixed=20)


def _copied_bytes_a_second(device: Any) -> float:
    source = _random(device, (LINK_BYTES // 2, 1, 1))
    target = device.empty(source.shape, source)

    def once() -> Any:
        device.copy(source, target)
        return target[:1]

    return 2 * LINK_BYTES / _seconds(device, once)


def _seconds(device: Any, once: Any, fixed: int = 0) -> float:
    """Time of one call among many: twice as many take so much longer. `fixed` calls, or enough."""

    def burst(calls: int) -> float:
        start = perf_counter()
        for _ in range(calls):
            last = once()
        device.download(last).wait()
        return perf_counter() - start

    burst(1)
    calls = fixed or 1
    while not fixed and burst(calls) < SHORTEST:
        calls *= 2
    return max(median(burst(2 * calls) - burst(calls) for _ in range(ROUNDS)) / calls, 1e-9)
