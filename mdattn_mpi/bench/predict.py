"""``mdattn bench predict``: what more ranks would take, from kernel times of one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import numbers, surroundings, table
from mdattn_mpi.errors import RejectedError

if TYPE_CHECKING:
    from mdattn_mpi.bench.timeline import Rates
    from mdattn_mpi.lockstep import World
    from mdattn_mpi.problem import Plan

DESCRIPTION = """\
Predict the share of ideal, t(1) / (P · t(P)), of every strategy on P ranks. The strategies' own
code runs in virtual time; what an attention call, a link, the memory and the host take is measured
here once and kept in a file. With two ranks or more, the links are measured too.

  mpirun -n 2 mdattn bench predict -b cuda --kernels h200.json --ranks 2,4,8
  mdattn bench predict --kernels h200.json --ranks 16      nothing is measured that is in the file

--against compares with what `mdattn bench attention -b cuda --json` has measured.
"""

STREAM = 8  # items of a batch


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
    add("--against", action="append", default=[], metavar="FILE", help="measured rows to compare")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure what the file lacks, then predict."""
    from mdattn_mpi.lockstep import watch

    return watch(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.bench.rates import measure
    from mdattn_mpi.bench.timeline import calls, trace
    from mdattn_mpi.lockstep import start
    from mdattn_mpi.strategies import STRATEGIES

    measured = _measured(arguments.against)
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
            kernels = measure(world, arguments, kernels, missing)
            _save(world, arguments.kernels, kernels)
        if world.rank == 0:
            rows = [{**_predict(plan, kernels), **measured.get(plan, {})} for plan in plans]
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
    """Play one plan as a single item and as a batch; a host that is slower than its GPU decides."""
    from mdattn_mpi.bench.timeline import host_seconds, simulate, trace
    from mdattn_mpi.strategies import STRATEGIES

    single, batch = (trace(plan, STRATEGIES[plan.strategy], items) for items in (1, STREAM))
    alone = simulate(trace(_alone(plan), STRATEGIES["ring"]), rates)
    one, all_of_them = simulate(single, rates), simulate(batch, rates)
    host = host_seconds(single, rates)
    each = max((all_of_them - one) / (STREAM - 1), host)
    one = max(one, host)
    problem = plan.problem
    return {
        "tokens": problem.q_tokens,
        "heads": f"{problem.q_heads}/{problem.kv_heads}",
        "mask": "full" if problem.causal == "none" else "causal",
        "ranks": plan.ranks,
        "strategy": plan.strategy,
        "alone_seconds": alone,
        "seconds": one,
        "host_seconds": host,
        "share": alone / (plan.ranks * one),
        "batch_share": alone / (plan.ranks * each),
    }


def _measured(paths: Sequence[str]) -> dict[Plan, dict[str, float]]:
    """Seconds and shares by plan, from what ``bench attention`` printed."""
    found: dict[Plan, dict[str, float]] = {}
    for path in paths:
        try:
            printed = json.loads(Path(path).read_text())
            for result in printed["results"]:
                found.update(_rows_of(printed["ranks"], result))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RejectedError(
                f"no measured rows ({type(error).__name__}: {error})",
                fix="give --against what `mdattn bench attention -b cuda --json` has printed",
                file=path,
            ) from None
    return found


def _rows_of(ranks: int, result: dict[str, Any]) -> Iterator[tuple[Plan, dict[str, float]]]:
    from mdattn_mpi.bench.attention_cuda import ONE, STREAM
    from mdattn_mpi.problem import AttentionProblem, Plan
    from mdattn_mpi.strategies import STRATEGIES

    seconds = {name: side["ms"] / 1e3 for name, side in result.pop("sides").items()}
    for name in STRATEGIES:
        if name not in seconds:
            continue
        row = {
            "measured_seconds": seconds[name],
            "measured_share": seconds[ONE] / ranks / seconds[name],
        }
        if name == "allgather":
            row["measured_batch_share"] = seconds[ONE] / ranks / seconds[STREAM]
        yield Plan(AttentionProblem(**result), name, ranks), row


def _table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    head = ["S", "N", "mask", "P", "strategy", "ms", "host", "share", "in a batch"]
    if compared := any("measured_seconds" in row for row in rows):
        head += ["measured", "predicted / it", "in a batch"]
    body = [[*_predicted(row), *(_compared(row) if compared else ())] for row in rows]
    return "\n".join([table([head, *body]), *(f"{key}: {value}" for key, value in facts.items())])


def _predicted(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["tokens"]),
        row["heads"],
        row["mask"],
        str(row["ranks"]),
        row["strategy"],
        f"{row['seconds'] * 1e3:.3f}",
        f"{row['host_seconds'] * 1e3:.3f}",
        f"{row['share']:.3f}",
        f"{row['batch_share']:.3f}",
    ]


def _compared(row: Mapping[str, Any]) -> list[str]:
    """The measured milliseconds, and predicted over measured shares."""
    if "measured_seconds" not in row:
        return ["", "", ""]
    batch = row.get("measured_batch_share")
    return [
        f"{row['measured_seconds'] * 1e3:.3f}",
        f"{row['share'] / row['measured_share']:.3f}",
        f"{row['batch_share'] / batch:.3f}" if batch else "",
    ]


# -- measured times, in a file ---------------------------------------------------------------------


def _load(world: World, path: str) -> Rates:
    """Collective. Read what was measured before; nothing if there is no file."""
    from mdattn_mpi.bench.timeline import Call, Rates

    text = b""
    if world.rank == 0 and Path(path).exists():
        text = Path(path).read_bytes()
    found = json.loads(world.bcast_bytes(text) or "{}")
    times = {Call(*each["call"]): each for each in found.get("attend", ())}
    memory = found.get("memory", 0.0)
    return Rates(
        {call: each["seconds"] for call, each in times.items()},
        found.get("bandwidth", 0.0),
        found.get("latency", 0.0),
        memory,
        found.get("merge", memory),
        found.get("launch", 0.0),
        found.get("host", {}),
        {call: each["after"] for call, each in times.items() if "after" in each},
    )


def _save(world: World, path: str, rates: Rates) -> None:
    if world.rank == 0:
        names = ("bandwidth", "latency", "memory", "merge", "launch", "host")
        found = {
            **{name: getattr(rates, name) for name in names},
            "attend": [
                {"call": call, "seconds": time, "after": rates.after.get(call, time)}
                for call, time in rates.attend.items()
            ],
            **surroundings(),
        }
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
