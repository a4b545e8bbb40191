"""Try TensorRT on GPUs that nobody here has: what runs, what is right, how fast; in one file.

On 2 to all ranks, every strategy, mask and dtype is built, proven on known numbers, and timed
beside our own engine on the same shards (`-b cuda`; its strategy is its own choice). What fails is
noted in the library's own words, and the next one is tried. A row is written as soon as it is
known: if the library hangs, the file still tells how far it came.

  mpirun -n 4 mdattn bench tensorrt -o tensorrt-a100.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import Side, surroundings, table, versions
from mdattn_mpi.bench.options import add_rounds, add_shapes, problems
from mdattn_mpi.errors import MdattnError

if TYPE_CHECKING:
    from mdattn_mpi.backends import Backend
    from mdattn_mpi.lockstep import Group, World
    from mdattn_mpi.problem import AttentionProblem

STRATEGIES = ("ring", "allgather", "ulysses")
WORDS = 700  # characters of an error that are kept
SHORT = 16  # tokens a rank by which an engine is proven
PACKAGES = ("tensorrt", "tensorrt-rtx", "nccl4py", "nvidia-cudnn-frontend", "cuda-bindings")
ABOUT = ("device", "tensorrt", "tensorrt_rtx")  # what of a backend's description goes along

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare shapes, rounds, and where the file goes."""
    add_shapes(parser, lengths=(16384,), q_heads=32, kv_heads=8, causal="both", dtype="both")
    add_rounds(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("mdattn-tensorrt.json"),
        metavar="FILE",
        help="what to send back (default: mdattn-tensorrt.json)",
    )


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Try everything on 2 to all ranks; rank 0 writes the file and prints a table."""
    rows: list[Row] = []
    facts: dict[str, str] = {}

    def note(row: Row) -> None:
        rows.append(row)
        facts.update(row.pop("facts", {}))
        text = {"facts": {**versions(*PACKAGES), **surroundings(), **facts}, "rows": rows}
        arguments.output.write_text(json.dumps(text, indent=1))

    for size in range(2, world.size + 1):
        group = world.split(int(world.rank >= size))
        if world.rank < size:
            for row in try_all(group, list(problems(arguments)), arguments.rounds):
                if world.rank == 0:
                    note(row)
        world.board.wait()
        world.barrier()
        group.free()
    if world.rank == 0 and arguments.json:
        print(arguments.output.read_text())
    elif world.rank == 0:
        lines = [("ranks", "strategy", "mask", "dtype", "TensorRT", "cuda"), *map(_line, rows)]
        print(*table(lines), f"please send us {arguments.output}", sep="\n")


def try_all(group: Group, todo: list[AttentionProblem], rounds: int) -> Iterator[Row]:
    """Collective. Every strategy on every problem, one row each."""
    for problem in todo:
        ours = _try(group, "cuda", problem, "auto", rounds)
        for strategy in STRATEGIES:
            theirs = _try(group, "tensorrt", problem, strategy, rounds)
            yield {
                "ranks": group.size,
                "strategy": strategy,
                "mask": problem.causal,
                "dtype": problem.dtype,
                "tokens": problem.q_tokens,
                "facts": theirs.pop("facts", {}),
                "tensorrt": theirs,
                "cuda": {name: value for name, value in ours.items() if name != "facts"},
            }


def _try(group: Group, name: str, problem: AttentionProblem, strategy: Any, rounds: int) -> Row:
    """Collective. Build, prove, time; or what was said instead, where all ranks say the same."""
    from mdattn_mpi.backends import open_backend

    backend: Backend | None = None
    began = perf_counter()
    try:
        backend = open_backend(name, group)
        # One engine for both: proven on the short one, timed on the other.
        tokens = min(problem.q_tokens, SHORT * group.size)
        short = replace(problem, q_tokens=tokens, kv_tokens=tokens)
        backend.prepare([short, problem], strategy)
        plan = backend.plan(problem, strategy, lse=False)
        ready = perf_counter() - began
        took = _milliseconds(group, Side(backend, plan, group.rank), rounds)
        found = {"strategy": plan.strategy, "ready_s": round(ready, 3), **took}
        if name == "tensorrt":
            facts = {name: text for name, text in backend.describe().items() if name in ABOUT}
            found |= {"proof": plan.reasons[-1], "facts": facts}
    except MdattnError as error:
        if backend:
            backend.abort()
        return {"error": error.what[:WORDS], "fix": error.fix}
    backend.close()
    return found


def _milliseconds(group: Group, side: Side, rounds: int) -> Row:
    """Collective. Median time of an item from the host and back; of it, the GPU's computing."""
    import numpy as np

    shards, wall, busy = side.random_shards(), [], []
    for _ in range(rounds + 1):
        group.barrier()
        before, began = side.backend.timings()["compute"], perf_counter()
        side.attend(shards)
        wall.append(perf_counter() - began)
        busy.append(side.backend.timings()["compute"] - before)
    every = np.array(group.allgather([wall[1:], busy[1:]]))  # [ranks, 2, rounds]
    item, compute = 1e3 * np.median(every.max(axis=0), axis=1)
    return {"item_ms": round(float(item), 3), "compute_ms": round(float(compute), 3)}


def _line(row: Row) -> tuple[str, ...]:
    """A row of the table: times, or that there is an error to read in the file."""
    times = (
        f"{row[side]['item_ms']:.2f} ms" if "item_ms" in row[side] else "see the file"
        for side in ("tensorrt", "cuda")
    )
    return (str(row["ranks"]), row["strategy"], row["mask"], row["dtype"], *times)
