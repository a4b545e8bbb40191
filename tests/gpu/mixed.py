"""Where the time of a job of mixed lengths goes, on real GPUs and with files that cost nothing.

    mpirun -n 2 --bind-to none python tests/gpu/mixed.py [--kernel NAME] [--passes N]

The items of `mdattn bench job --mixed --items 24 --q-heads 16 --kv-heads 4 --causal`, several times
over. For each pass: seconds, the kernels' seconds, what the main thread spent in which phase, and
how often and how long the driver was asked for memory and kernels were made ready. For the last
one: when each item was begun and enqueued by the host, uploaded, and computed from when to when.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mdattn_mpi.backends import StrategyBackend
from mdattn_mpi.bench import job as bench
from mdattn_mpi.devices.cuda.clock import Clock
from mdattn_mpi.devices.cuda.copies import PeerCopies
from mdattn_mpi.devices.cuda.driver import Gpu
from mdattn_mpi.devices.cuda.launches import Launches
from mdattn_mpi.devices.cuda.memory import Memory
from mdattn_mpi.lockstep import World, start, together
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.runner.batch import files_of
from mdattn_mpi.runner.clock import PhaseClock
from mdattn_mpi.runner.events import Events
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.opening import open_files, open_job

MIB = 1 << 20
Note = Callable[[float, float, tuple[Any, ...], Any], None]
Asked = dict[str, list[float]]  # seconds of each call
Noted = list[tuple[str, float, Any]]  # what, when by the host, and an event of the GPU


def watch(
    kind: type, name: str, note: Callable[[float, float, tuple[Any, ...], Any], None]
) -> None:
    """Let `note` hear of every call of a method: its beginning, its end, arguments and result."""
    original = getattr(kind, name)

    def called(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        found = original(*args, **options)
        note(begin, time.perf_counter(), args, found)
        return found

    setattr(kind, name, called)


def watch_all(asked: Asked, noted: Noted, phases: dict[str, float]) -> None:
    """Note what the driver is asked for, and when items are begun, enqueued and computed."""
    for kind, name in ((Gpu, "pinned"), (Gpu, "allocate"), (Launches, "_make"),
                       (Memory, "_fill_holes"), (StrategyBackend, "begin"),
                       (StrategyBackend, "enqueue"), (StrategyBackend, "collect")):  # fmt: skip
        watch(kind, name, lambda begin, end, *_, name=name: asked[name].append(end - begin))
    watch(PhaseClock, "stop", lambda *call: phases.update(call[2][0].seconds))

    def begun(begin: float, end: float, args: tuple[Any, ...], _: Any) -> None:
        device = args[0].device
        noted.append(("uploaded", begin, device._upwards.mark(timed=True)))

    watch(StrategyBackend, "begin", begun)
    watch(StrategyBackend, "enqueue", lambda begin, *_: noted.append(("enqueued", begin, None)))

    def computed(begin: float, end: float, args: tuple[Any, ...], _: Any) -> None:
        noted.append(("computing", begin, args[1]))
        noted.append(("computed", begin, args[2]))

    watch(Clock, "computed", computed)
    watch(PeerCopies, "arrival", lambda begin, *call: noted.append(("there", begin, call[2][1])))


def bandwidth(world: World, device: Any) -> None:
    """Collective. Print what all ranks' links to their hosts carry at a time."""
    nbytes, gpu = 64 * MIB, device._gpu
    host = [gpu.pinned(nbytes) for _ in range(2)]
    here = [gpu.allocate(nbytes) for _ in range(2)]
    streams = [gpu.stream(), gpu.stream()]
    ways = {"up": [(here[0], host[0])], "down": [(host[1], here[1])]}
    ways["both"] = ways["up"] + ways["down"]
    for name, copies in ways.items():
        for turn in range(2):
            world.barrier()
            gpu.synchronize()
            begin = time.perf_counter()
            for _ in range(10):
                for (target, source), stream in zip(copies, streams, strict=False):
                    gpu.copy(target, source, nbytes, stream)
            gpu.synchronize()
            seconds = time.perf_counter() - begin
            if turn:
                each = world.allgather(10 * len(copies) * nbytes / seconds / 1e9)
                if world.rank == 0:
                    print(f"{name}: {', '.join(f'{rate:.1f}' for rate in each)} GB/s", flush=True)
    for address in here:
        gpu.release(address)
    for address in host:
        gpu.release_pinned(address)


def print_timeline(noted: Noted, began: float) -> None:
    """Print a line an item, in milliseconds after the pass began."""
    found: dict[str, list[tuple[float, Any]]] = defaultdict(list)
    for what, when, event in noted:
        found[what].append((1e3 * (when - began), event))
    first = found["uploaded"][0][1]
    offset = found["uploaded"][0][0]  # roughly: as if the first upload took no time
    print("item: begun, enqueued by the host; on the GPU uploaded, keys there, computing, computed")
    names = ("uploaded", "enqueued", "there", "computing", "computed")
    rows = zip(*(found[name] for name in names), strict=False)  # the shortest, last, are replayed
    for number, row in enumerate(rows):
        gpu = [offset + (event - first) for _, event in (row[0], *row[2:])]
        times = (row[0][0], row[1][0], *gpu)
        print(f"{number:3}: " + " ".join(f"{each:7.2f}" for each in times))


def main() -> int:
    """Collective. Make the items, and compute them several times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--passes", type=int, default=4)
    arguments = parser.parse_args()
    asked: Asked = defaultdict(list)
    noted: Noted = []
    phases: dict[str, float] = {}
    watch_all(asked, noted, phases)
    world = start()
    folder = Path(tempfile.gettempdir()) / f"mdattn-mixed-{world.job:016x}"
    kinds = [AttentionProblem(n, n, 16, 4, 128, 128, "bfloat16", "upper_left") for n in bench.MIXED]

    def make() -> None:
        if world.rank == 0:
            folder.mkdir(parents=True)
            bench._make_dataset(folder / "data.h5", [kinds[n % len(kinds)] for n in range(24)])

    together(world, "dataset", make)
    spec = JobSpec(str(folder / "data.h5"), str(folder / "out.h5"), backend="cuda",
                   kernel=arguments.kernel, nonfinite="pass", overwrite=True)  # fmt: skip
    job = open_job(spec, world)
    open_files(job)
    assert job.output is not None
    device = job.groups[0].executor.device  # type: ignore[attr-defined]
    bandwidth(world, device)
    memory = bench._in_memory(job, files_of(job, job.output, Events()))
    for number in range(arguments.passes):
        world.barrier()
        asked.clear()
        noted.clear()
        before, began = device.seconds, time.perf_counter()
        bench._compute(job, memory, bench.in_order(job))
        device._gpu.synchronize()
        world.barrier()
        seconds, after = time.perf_counter() - began, device.seconds
        kernels = after["compute"] - before["compute"] - after["merge"] + before["merge"]
        if world.rank == 0:
            calls = {name: f"{len(each)}: {sum(each):.4f}" for name, each in asked.items()}
            spent = {name: f"{each:.4f}" for name, each in phases.items()}
            print(f"pass {number}: {seconds:.4f} s, kernels {kernels:.4f} s\n  {calls}\n  {spent}")
    if world.rank == 0:
        print_timeline(noted, began)
    bench.close(job)
    if world.rank == 0:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    world.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
