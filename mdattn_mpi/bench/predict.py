"""What more ranks would take, from kernel times of one.

Predict the share of ideal, t(1) / (P · t(P)), of every strategy on P ranks. The strategies' own
code runs in virtual time; what an attention call, a link, the memory and the host take is measured
here once, on GPUs, and kept in a file. With two ranks or more, the links are measured too.

  mpirun -n 2 mdattn bench predict --kernels h200.json --ranks 2,4,8
  mdattn bench predict --kernels h200.json --ranks 16      nothing is measured that is in the file

--against compares with what `mdattn bench attention -b cuda --json` has measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import report, surroundings
from mdattn_mpi.bench.options import add_shapes, numbers, problems
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.files import write_whole
from mdattn_mpi.mask import FULL, LOWER_RIGHT, Band
from mdattn_mpi.problem import FLAT_STRATEGIES, AttentionProblem, Plan, StrategyName

if TYPE_CHECKING:
    from mdattn_mpi.bench.timeline import Call, Timings
    from mdattn_mpi.lockstep import World

LABELS = ("S", "N", "mask", "P", "strategy", "ms")
STREAM = 8  # items of a batch
NAMES = ("bandwidth", "latency", "memory", "merge", "launch", "host")  # in the file


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare files, ranks and shapes."""
    add = parser.add_argument
    add("--kernels", required=True, metavar="FILE", help="measured times, read and completed")
    add("--ranks", type=numbers, default=(2, 4, 8), metavar="P,P", help="default: 2,4,8")
    add("--against", action="append", default=[], metavar="FILE", help="measured rows to compare")
    add_shapes(parser, lengths=(8192, 32768, 131072), causal="both")


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Measure what the file lacks, then predict."""
    from mdattn_mpi.bench import stopwatch
    from mdattn_mpi.bench.timeline import calls, trace
    from mdattn_mpi.strategies import STRATEGIES

    measured = _measured(arguments.against)
    plans = [
        Plan(problem, name, ranks)
        for problem in problems(arguments)
        for ranks in arguments.ranks
        for name in FLAT_STRATEGIES
    ]
    timings = _load(world, arguments.kernels)
    needed = {
        call
        for plan in plans
        for one in (plan, _alone(plan))
        for call in calls(trace(one, STRATEGIES[one.strategy]))
    }
    if missing := sorted(needed - timings.attend.keys(), key=repr):
        timings = stopwatch.measure(world, timings, missing)
        _save(world, arguments.kernels, timings)
    if world.rank == 0:
        rows = [{**_predict(plan, timings), **measured.get(plan, {})} for plan in plans]
        report({"rows": rows}, list(_table(rows)), {}, as_json=arguments.json)


def labels(problem: AttentionProblem, ranks: int, strategy: StrategyName) -> dict[str, Any]:
    """Say what a row is about."""
    return {
        "tokens": problem.q_tokens,
        "heads": f"{problem.q_heads}/{problem.kv_heads}",
        "mask": "full" if problem.causal == "none" else "causal",
        "ranks": ranks,
        "strategy": strategy,
    }


def labelled(row: Mapping[str, Any]) -> list[str]:
    """The first cells of a row: what it is about, and its milliseconds; see `LABELS`."""
    about = (str(row[name]) for name in ("tokens", "heads", "mask", "ranks", "strategy"))
    return [*about, f"{row['seconds'] * 1e3:.3f}"]


def _alone(plan: Plan) -> Plan:
    return Plan(plan.problem, "ring", 1)


def _predict(plan: Plan, timings: Timings) -> dict[str, Any]:
    """Play one plan as a single item and as a batch; a host that is slower than its GPU decides."""
    from mdattn_mpi.bench.timeline import host_seconds, simulate, trace
    from mdattn_mpi.strategies import STRATEGIES

    single, batch = (trace(plan, STRATEGIES[plan.strategy], items) for items in (1, STREAM))
    alone = simulate(trace(_alone(plan), STRATEGIES["ring"]), timings)
    one, all_of_them = simulate(single, timings), simulate(batch, timings)
    host = host_seconds(single, timings)
    each = max((all_of_them - one) / (STREAM - 1), host)
    one = max(one, host)
    return {
        **labels(plan.problem, plan.ranks, plan.strategy),
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


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    compared = any("measured_seconds" in row for row in rows)
    yield [
        *(*LABELS, "host", "share", "in a batch"),
        *(("measured", "predicted / it", "in a batch") if compared else ()),
    ]
    for row in rows:
        yield [*_predicted(row), *(_compared(row) if compared else ())]


def _predicted(row: Mapping[str, Any]) -> list[str]:
    return [
        *labelled(row),
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


def _load(world: World, path: str) -> Timings:
    """Collective. Read what was measured before; nothing if there is no file."""
    from mdattn_mpi.bench.timeline import Timings

    text = b""
    if world.rank == 0 and Path(path).exists():
        text = Path(path).read_bytes()
    found = json.loads(world.bcast_bytes(text) or "{}")
    times = {_call(each["call"]): each for each in found.get("attend", ())}
    return Timings(
        {call: each["seconds"] for call, each in times.items()},
        after={call: each["after"] for call, each in times.items() if "after" in each},
        **{name: found[name] for name in NAMES if name in found},
    )


def _call(words: Sequence[Any]) -> Call:
    """Make a call of a line of the file; earlier versions wrote whether it is causal."""
    from mdattn_mpi.bench.timeline import Call

    mask = words[6]
    band = Band(*mask) if isinstance(mask, list) else LOWER_RIGHT if mask else FULL
    return Call(*(*words[:6], band))


def _save(world: World, path: str, timings: Timings) -> None:
    if world.rank == 0:
        found = {
            **{name: getattr(timings, name) for name in NAMES},
            "attend": [
                {"call": call, "seconds": time, "after": timings.after.get(call, time)}
                for call, time in timings.attend.items()
            ],
            **surroundings(),
        }
        write_whole(Path(path), json.dumps(found, indent=1) + "\n")
