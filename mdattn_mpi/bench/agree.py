"""What an agreement costs over a barrier, and lockstep over a bare step.

Time an agreement against a plain MPI barrier, and steps of about a millisecond with lockstep (three
phases noted, one agreement) against the same steps with a barrier. Short bursts, alternating;
medians of the slowest rank. The watchdog's share of a core comes on top: bursts this short mostly
miss it, so its processor time is read from the kernel.

On two ranks it also predicts an agreement on more, each with a core of its own: what Python takes,
and a hop for each doubling of ranks, measured between the two, plus --latency of the network.
Beside it the same with a slot in the all-reduce for every rank's checksum, however many.

  mpirun -n 2 mdattn bench agree
  mpirun -n 2 mdattn bench agree --ranks 64,1024 --latency 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from mdattn_mpi.bench.measure import alternate, report, versions
from mdattn_mpi.bench.options import add_rounds, numbers

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World

CALLS = 50  # a burst is shorter than a slice of the scheduler's time
STEPS = 4
PAIR = 2  # ranks between which a hop is measured
RANKS = (64, 256, 512, 1024)
PHASES = ("agree", "begin", "enqueue")  # of the batch loop, where no file is waited for


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare how many bursts of each kind, and what to predict."""
    add_rounds(parser, 400)
    add = parser.add_argument
    add("--ranks", type=numbers, default=RANKS, metavar="P,P", help="to predict: 64,256,512,1024")
    add("--latency", type=float, default=2.0, metavar="US", help="of the network (default: 2 µs)")


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
        **(_predicted(world, arguments) if world.size == PAIR else {}),
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
            world.agree(Step(item, "begin", 0x123456789ABCDEF), word=item, reader=0)

    def enter() -> None:
        for _ in range(CALLS):
            world.board.enter("enqueue", "item-17", 600.0)

    kinds = {"barrier": barrier, "agree": agree, "enter": enter}
    took = alternate(kinds, rounds, before=world.control.Barrier, world=world)
    return {name: seconds / CALLS for name, seconds in took.items()}


def _predicted(world: World, arguments: argparse.Namespace) -> dict[str, float]:
    """Microseconds of an agreement by number of ranks; on the one that commits, of the gather."""
    from mdattn_mpi.lockstep.agreement import HEAD_WORDS

    hops = _hops(world, arguments.rounds, [HEAD_WORDS, *(HEAD_WORDS + p for p in arguments.ranks)])
    found = {}
    for ranks in arguments.ranks:
        doublings = (ranks - 1).bit_length()
        by_words = {
            words: hops["python"] + hops[f"unpack {words}"]
            + doublings * (1e-6 * arguments.latency + hops[f"reduce {words}"])
            for words in (HEAD_WORDS, HEAD_WORDS + ranks)
        }  # fmt: skip
        gather = doublings * (1e-6 * arguments.latency + hops["gather"])
        found[f"slots_{ranks}_us"] = by_words[HEAD_WORDS + ranks]
        found[f"gathered_{ranks}_us"] = by_words[HEAD_WORDS]
        found[f"gather_{ranks}_us"] = gather
    return {name: round(1e6 * seconds, 1) for name, seconds in found.items()}


def _hops(world: World, rounds: int, words: list[int]) -> dict[str, float]:
    """Seconds between two ranks: to reduce so many words, to gather one; and what Python takes."""
    from struct import Struct

    import numpy as np

    from mdattn_mpi.lockstep import Step
    from mdattn_mpi.lockstep.mpi import MPI

    alone, comm = world.split(world.rank), world.control
    own, both = np.zeros(1, np.uint64), np.zeros(world.size, np.uint64)

    def python() -> None:
        alone.agree(Step(7, "begin", 0x123456789ABCDEF), word=7, reader=0)

    kinds: dict[str, Callable[[], object]] = {
        "python": python,
        "gather": lambda: comm.Gather(own, both, 0),
    }
    for count in words:
        sent, received = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        kinds[f"reduce {count}"] = partial(comm.Allreduce, sent, received, MPI.MAX)
        kinds[f"unpack {count}"] = partial(Struct(f"={count}Q").unpack, received.tobytes())

    def burst(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    bursts = {name: partial(burst, call) for name, call in kinds.items()}
    took = alternate(bursts, rounds, before=comm.Barrier, world=world)
    alone.free()
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
                    world.agree(Step(item, "begin", 0x123456789ABCDEF), word=item, reader=0)
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
