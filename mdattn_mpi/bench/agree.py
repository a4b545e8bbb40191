"""What an agreement costs over a barrier, and lockstep over a bare step.

Time an agreement against a plain MPI barrier, and steps of about a millisecond with lockstep (three
phases noted, one agreement) against the same steps with a barrier. Short bursts, alternating;
medians of the slowest rank. The watchdog's share of a core comes on top: bursts this short mostly
miss it, so its processor time is read from the kernel.

  mpirun -n 2 mdattn bench agree
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from mdattn_mpi.bench.measure import alternate, report, versions
from mdattn_mpi.bench.options import add_rounds

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World

CALLS = 50  # a burst is shorter than a slice of the scheduler's time
STEPS = 4
PHASES = ("agree", "begin", "enqueue")  # of the batch loop, where no file is waited for


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare how many bursts of each kind."""
    add_rounds(parser, 400)


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Measure; rank 0 prints."""
    calls = _calls(world, arguments.rounds)
    steps, watchdog = _steps(world, arguments.rounds)
    lockstep = steps["watched_step"] / steps["bare_step"] - 1
    figures = {
        "ranks": world.size,
        **{f"{name}_us": round(1e6 * seconds, 3) for name, seconds in calls.items()},
        "agree_over_barrier_us": round(1e6 * (calls["agree"] - calls["barrier"]), 3),
        **{f"{name}_ms": round(1e3 * seconds, 4) for name, seconds in steps.items()},
        "lockstep_share": round(lockstep, 5),
        "watchdog_share": round(watchdog, 5),
        "all_share": round(lockstep + watchdog, 5),
    }
    if world.rank == 0:
        rows = [(name, str(value)) for name, value in figures.items()]
        report(figures, rows, versions("mpi4py"), as_json=arguments.json)


def _calls(world: World, rounds: int) -> dict[str, float]:
    """Seconds of one call of each kind."""
    from mdattn_mpi.lockstep import Step

    def barrier() -> None:
        for _ in range(CALLS):
            world.control.Barrier()

    def agree() -> None:
        for item in range(CALLS):
            world.agree(Step(item, "begin", 0x123456789ABCDEF), word=item)

    def enter() -> None:
        for _ in range(CALLS):
            world.board.enter("enqueue", "item-17", 600.0)

    kinds = {"barrier": barrier, "agree": agree, "enter": enter}
    took = alternate(kinds, rounds, before=world.control.Barrier, world=world)
    return {name: seconds / CALLS for name, seconds in took.items()}


def _steps(world: World, rounds: int) -> tuple[dict[str, float], float]:
    """Seconds of one step, without and with lockstep; the watchdog's share of a core."""
    from mdattn_mpi.lockstep import Deadlines, Step
    from mdattn_mpi.runner.clock import PhaseClock
    from mdattn_mpi.runner.loop import MEANWHILE

    compute = _millisecond(world)
    clock = PhaseClock(world.board, Deadlines())

    def bare_step() -> None:
        for _ in range(STEPS):
            world.control.Barrier()
            compute()

    def watched_step() -> None:
        for item in range(STEPS):
            for name in PHASES:
                clock.enter(name, "item-17", 1 << 20, MEANWHILE if name == "agree" else ())
                if name == "agree":
                    world.agree(Step(item, "begin", 0x123456789ABCDEF), word=item)
                elif name == "enqueue":
                    compute()
            world.board.progress(item, STEPS)

    with _run_folder(world):
        kinds = {"bare_step": bare_step, "watched_step": watched_step}
        began, before = perf_counter(), _processor_seconds(world.board.watchdog_pid)
        took = alternate(kinds, rounds, before=world.control.Barrier, world=world)
        used = _processor_seconds(world.board.watchdog_pid) - before
        share = used / (perf_counter() - began)
        return {name: seconds / STEPS for name, seconds in took.items()}, share


def _millisecond(world: World) -> Callable[[], None]:
    """Work, not waiting, of about a millisecond, the same on all ranks."""
    import numpy as np

    matrix = np.random.default_rng(world.rank).standard_normal((64, 64), np.float32)

    def multiply(times: int) -> float:
        began = perf_counter()
        for _ in range(times):
            np.dot(matrix, matrix)
        return perf_counter() - began

    own = median(multiply(100) for _ in range(20)) / 100
    text = world.bcast_bytes(json.dumps(max(1, round(1e-3 / own))).encode())
    times: int = json.loads(text)

    def compute() -> None:
        multiply(times)

    return compute


def _processor_seconds(pid: int) -> float:
    """What all threads of a process have used so far."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def _run_folder(world: World) -> Iterator[None]:
    """Attach all ranks to a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mdattn-bench-") as own:
        folder = world.bcast_bytes(own.encode()).decode()
        world.board.attach(folder, world.rank, world.size)
        yield
        world.board.detach()
        world.barrier()
