"""What benchmarks share: turns, medians, a common form of report, and where figures come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.text import show

if TYPE_CHECKING:
    from mdattn_mpi.backends import Backend, HostArray
    from mdattn_mpi.lockstep import Group, World
    from mdattn_mpi.problem import AttentionProblem, Plan

HERE = Path(__file__).parent


def on_all_ranks(measure: Callable[[World], None]) -> int:
    """Collective. Measure under the watchdog, as a job runs; return the exit code."""
    from mdattn_mpi.lockstep import watch

    def run() -> int:
        from mdattn_mpi.lockstep import start

        with start() as world:
            measure(world)
        return 0

    return watch(run)


class Side(NamedTuple):
    """A group's CPU backend and plan; `random_shards` and `attend` use them."""

    backend: Backend
    plan: Plan
    rank: int

    @staticmethod
    def open(group: Group, strategy: Any, threads: int, problem: AttentionProblem) -> Side:
        """Collective. Open the backend with `threads` a rank, and plan."""
        from mdattn_mpi.backends import open_backend

        backend = open_backend("cpu", group, threads=threads)
        return Side(backend, backend.plan(problem, strategy, lse=False), group.rank)

    def random_shards(self) -> list[HostArray]:
        """This rank's query, key and value; making them takes no other memory to speak of."""
        import numpy as np

        from mdattn_mpi.dataset import NUMPY, TENSORS
        from mdattn_mpi.dataset.making import shapes
        from mdattn_mpi.partition import partition_of, token_count

        problem, owners = self.plan.problem, partition_of(self.plan)
        random, shards = np.random.default_rng(self.rank), []
        for tensor in TENSORS:
            spans = (owners.query if tensor == "query" else owners.kv)[self.rank]
            shape = (token_count(spans), *shapes(problem)[tensor][1:])
            shards.append(np.empty(shape, NUMPY[problem.dtype]))
            for start in range(0, shape[0], 1024):
                some = shards[-1][start : start + 1024]
                some[...] = random.standard_normal(some.shape, np.float32)
        return shards

    def attend(self, shards: Sequence[HostArray]) -> None:
        """Collective. Attend once."""
        running = self.backend.begin(self.plan, *shards)
        self.backend.enqueue(running)
        self.backend.collect(running).wait()


def alternate(
    kinds: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    before: Callable[[], Any] = lambda: None,
    world: World | None = None,
) -> dict[str, float]:
    """Collective, where there is a world. Median seconds of `kinds`, another one first each time.

    The first round doesn't count, `before` is called before every run and isn't timed, and of
    several ranks the slowest counts each time.

    Raises
    ------
    RejectedError
        Less than one round.

    """
    if rounds < 1:
        raise RejectedError(f"{rounds} rounds", fix="use at least one")
    took: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name in sorted(kinds, reverse=number % 2 > 0):
            before()
            began = perf_counter()
            kinds[name]()
            took[name].append(perf_counter() - began)
    ranks = world.allgather(took) if world else [took]
    return {
        name: median(
            [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)][1:]
        )
        for name in took
    }


def report(
    figures: Mapping[str, Any],
    rows: Sequence[Sequence[str]],
    facts: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print `figures` as JSON, or `rows` as a table; either way with the facts and surroundings."""
    facts = {**facts, **surroundings()}
    if as_json:
        show(json.dumps({**figures, "facts": facts}))
    else:
        show("\n".join((*table(rows), *(f"{name}: {value}" for name, value in facts.items()))))


def surroundings() -> dict[str, str]:
    """Where figures come from: cores, system, commit."""
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "commit": _commit(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages."""
    from mdattn_mpi.runner.folder import package_version

    return {package: package_version(package) for package in packages}


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as they must be, numbers to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _commit() -> str:
    """The commit of the checkout that runs, or the version of the installed package."""
    try:
        found = subprocess.run(
            ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "mdattn_mpi " + versions("mdattn_mpi")["mdattn_mpi"]
    return found.stdout.strip()
