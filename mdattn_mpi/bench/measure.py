"""What benchmarks share: alternating turns, medians, tables, and where figures come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World

HERE = Path(__file__).parent


def surroundings(*packages: str) -> dict[str, str]:
    """Where figures come from: cores, system, commit, and the versions of `packages`."""
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "commit": _commit(),
        **{package: _version(package) for package in packages},
    }


def report(facts: Mapping[str, Any], world: World, *, as_json: bool) -> None:
    """Print what was measured, once: a line a fact, or all as JSON."""
    if world.rank:
        return
    width = max(map(len, facts))
    lines = [f"{name:{width}}  {value}" for name, value in facts.items()]
    print(json.dumps(facts) if as_json else "\n".join(lines))


def numbers(text: str) -> tuple[int, ...]:
    """Parse ``2048,8192``; an argparse type."""
    return tuple(int(part) for part in text.split(","))


def alternate(
    world: World, kinds: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Collective. Median seconds of each of `kinds`, on the slowest rank each time."""
    took: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name in sorted(kinds, reverse=number % 2 > 0):  # another one first each time
            world.control.Barrier()
            began = perf_counter()
            kinds[name]()
            took[name].append(perf_counter() - began)
    ranks = world.allgather(took)
    return {
        name: median(max(times) for times in zip(*(rank[name] for rank in ranks), strict=True))
        for name in took
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


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
        return f"mdattn_mpi {_version('mdattn_mpi')}"
    return found.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
