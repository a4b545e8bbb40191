"""Check the CUDA device on real GPUs, then time it; a short table at the end.

    mpirun -n 2 python tests/gpu/run.py [check] [masks] [in-flight] [bench] [layers] [long] ...

Without words it checks and benches; `long` benches 512k, `window` a window of 4096 at 256k. `masks`
is the part of `check` with windows, packed documents, soft caps and sinks. `in-flight` is the part
that calls with arrays that are still being computed (see `in_flight`), `--calls` times each.
`--kernel` is for all but that, which takes what the library takes. Exit code 1 where a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import faulthandler
import itertools
import os
import pstats
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np

import mdattn_mpi
from mdattn_mpi.backends import StrategyBackend
from mdattn_mpi.devices.cuda.open import open_cuda
from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.lockstep import World, start
from mdattn_mpi.partition import partition_of
from mdattn_mpi.problem import AttentionProblem, Plan
from tests.gpu import in_flight
from tests.gpu.problems import (
    DTYPES,
    TOLERANCE,
    inputs,
    masked_problems,
    others,
    problems,
    reference,
)

TABLE = (
    (32768, 8, 8, 128, "none"),
    (131072, 8, 8, 128, "none"),
    (131072, 8, 8, 128, "upper_left"),
    (65536, 32, 8, 128, "none"),
    (65536, 32, 8, 128, "upper_left"),
    (131072, 8, 8, 64, "none"),
    (131072, 8, 8, 64, "upper_left"),
    (8192, 8, 8, 128, "none"),
    (16384, 8, 8, 128, "none"),
)
LONG = ((524288, 8, 8, 64, "none"), (524288, 8, 8, 64, "upper_left"))
WINDOWED = AttentionProblem(
    262144, 262144, 8, 8, 128, 128, "bfloat16", "upper_left", window=(4095, 0)
)


def check(world: World, transfer: str, kernel: str, wanted: list[AttentionProblem]) -> int:
    """Collective. A batch of everything through the backend's three steps; count what is wrong."""
    backend = StrategyBackend("cuda", open_cuda(world, transfer=transfer, kernel=kernel))
    batch = []
    for number, (problem, strategy) in enumerate(
        itertools.product(wanted, ("ring", "allgather", "ulysses"))
    ):
        arrays = inputs(problem, np.random.default_rng(number))
        try:
            batch.append((backend.plan(problem, strategy, lse=True), arrays))  # type: ignore[arg-type]
        except RejectedError as refusal:  # alike on all ranks
            if world.rank == 0 and strategy == "ring":
                print(f"refused: {refusal.what}")

    def begin(plan: Plan, arrays: list[Any]) -> Any:
        owners = partition_of(plan)
        spans = (owners.query, owners.kv, owners.kv)
        shards = [
            np.concatenate([array[:0], *(array[s.slice] for s in own[world.rank])])
            for array, own in zip(arrays, spans, strict=False)
        ]
        return backend.begin(plan, *shards, *arrays[3:])

    downloads, running = [], begin(*batch[0])
    for index in range(len(batch)):
        following = begin(*batch[index + 1]) if index + 1 < len(batch) else None
        backend.enqueue(running)
        downloads.append(backend.collect(running))
        if world.rank == 0 and index % 33 == 32:
            print(f"    {index + 1} of {len(batch)} items asked for", flush=True)
        running = following
    wrong = sum(
        _wrong(world, transfer, plan, arrays, *download.wait())
        for (plan, arrays), download in zip(batch, downloads, strict=True)
    )
    if world.rank == 0:
        about = backend.describe()["kernel"]
        print(f"{len(batch)} items at {world.size} ranks by {transfer}, {about}")
        print(f"    seconds: {backend.timings()}", flush=True)
    backend.close()
    return wrong


def _wrong(world: World, transfer: str, plan: Plan, arrays: list[Any], out: Any, lse: Any) -> bool:
    problem, own = plan.problem, partition_of(plan).query[world.rank]
    right, right_lse = reference(problem, *arrays)
    if plan.strategy == "ring":
        for other in others(problem):
            apart = np.linalg.norm(reference(other, *arrays[: 3 + other.sinks])[0] - right)
            assert apart > 10 * TOLERANCE[problem.dtype] * np.linalg.norm(right), (problem, other)
    rows = np.concatenate([np.arange(0), *(np.arange(s.start, s.stop) for s in own)]).astype(int)
    right, right_lse = right[rows], right_lse[rows]
    error = np.linalg.norm(out.astype(float) - right) / max(1e-30, np.linalg.norm(right))
    empty = np.isneginf(right_lse)
    good = (
        bool(np.isfinite(out.astype(float)).all())
        and (error < TOLERANCE[problem.dtype] or not right.any())
        and bool((np.isneginf(lse) == empty).all())
        and bool(np.allclose(lse[~empty], right_lse[~empty], atol=2e-3))
    )
    if not good:
        print(f"WRONG, rank {world.rank}, {transfer}: {plan.strategy}: {problem}: {error:.2e}")
    return not good


def check_arrays_of_others(world: World) -> int:
    """Collective. The library call on the arrays of PyTorch, CuPy and JAX, where they are there."""
    wrong, done = 0, []
    for library in (of_torch, of_cupy, of_jax):
        name = library.__name__[3:]
        try:
            import_module(name)
        except ImportError:
            continue
        wrong += _check_arrays(world, name, *library(world.local_rank))
        done.append(name)
    if world.rank == 0:
        print(f"the library call took and gave the arrays of {', '.join(done)}")
    return wrong


def of_torch(ordinal: int) -> tuple[str, type, Any, Any]:
    """A dtype, the kind of arrays, and the ways from and to NumPy's."""
    import torch

    torch.cuda.set_device(ordinal)
    return (
        "bfloat16",
        torch.Tensor,
        lambda array: torch.tensor(array.view(np.int16)).view(torch.bfloat16).cuda(),
        lambda array: array.double().cpu().numpy(),
    )


def of_cupy(ordinal: int) -> tuple[str, type, Any, Any]:
    """A dtype, the kind of arrays, and the ways from and to NumPy's."""
    import cupy

    cupy.cuda.Device(ordinal).use()
    return "float16", cupy.ndarray, cupy.asarray, lambda array: cupy.asnumpy(array).astype(float)


def of_jax(ordinal: int) -> tuple[str, type, Any, Any]:
    """A dtype, the kind of arrays, and the ways from and to NumPy's."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    gpu = jax.devices("cuda")[ordinal]
    return (
        "bfloat16",
        jax.Array,
        lambda array: jax.device_put(array, gpu),
        lambda array: np.asarray(array).astype(float),
    )


def _check_arrays(world: World, name: str, dtype: str, kind: type, give: Any, take: Any) -> int:
    problem = AttentionProblem(1200, 1200, 4, 2, 64, 64, dtype, "upper_left")  # type: ignore[arg-type]
    random = np.random.default_rng(3)
    whole = [random.standard_normal((1200, n, 64)).astype(DTYPES[dtype]) for n in (4, 2, 2)]
    right, right_lse = reference(problem, *whole)
    rows = mdattn_mpi.shard_spans(1200, world.rank, world.size)[0].slice
    wrong = 0
    for _ in range(3):
        own = [give(array[rows]) for array in whole]
        out, lse = mdattn_mpi.attention(world.comm, *own, causal="upper_left", return_lse=True)
        error = np.linalg.norm(take(out) - right[rows]) / np.linalg.norm(right[rows])
        good = error < TOLERANCE[dtype] and np.allclose(take(lse), right_lse[rows], atol=2e-3)
        wrong += not (good and isinstance(out, kind) and isinstance(lse, kind))
    if wrong:
        print(
            f"WRONG, rank {world.rank}: the library on arrays of {name}: {error:.2e}, {type(out)}"
        )
    return wrong


def million(world: World, kernel: str) -> int:
    """Collective. One item of 2²⁰ tokens by `ring`: sampled rows against float64, peak memory."""
    import torch

    from mdattn_mpi.bench.attention_cuda import Inputs
    from mdattn_mpi.strategies import STRATEGIES

    device = open_cuda(world, kernel=kernel)
    problem = AttentionProblem(1 << 20, 1 << 20, 8, 8, 128, 128)
    plan = Plan(problem, "ring", world.size)
    inputs = Inputs(problem, seed=5)
    own = partition_of(plan).query[world.rank]
    shards = [
        array.cpu().view(torch.uint16).numpy() for array in inputs.shards(plan, world.rank)[0]
    ]
    arrays = [device.upload(array.view(ml_dtypes.bfloat16)) for array in shards]
    world.barrier()
    begin = time.perf_counter()
    steps = STRATEGIES["ring"](device, plan, *arrays)
    next(steps)
    try:
        next(steps)
    except StopIteration as end:
        out, lse = end.value
    device.mark().sync()
    taken = time.perf_counter() - begin
    del arrays, steps
    host = device.download(out, lse).wait()[0]
    error = inputs.error(torch.tensor(host.view(np.uint16)).view(torch.bfloat16).cuda(), own, own)
    needed = 6 * out.nbytes  # query, key, value, output, and the second key and value
    print(
        f"rank {world.rank}: 1048576 tokens, 8/8, ring: {taken:.2f} s "
        f"({problem.flops / taken / world.size / 1e12:.0f} TFLOP/s a GPU), error {error:.2e}, "
        f"peak {device.memory.peak / 2**30:.2f} GiB, "
        f"{device.memory.peak / needed:.2f} of its shards and buffers"
    )
    device.close()
    return int(not error < 4e-3)


def profile(world: World, kernel: str) -> None:
    """Collective. Where the time of a lone call goes: on the GPU, and on the host."""
    from mdattn_mpi.bench import attention_cuda as bench

    device = open_cuda(world, kernel=kernel, timings=False)
    for length in (8192, 16384):
        problem = AttentionProblem(length, length, 8, 8, 128, 128)
        for side in bench.our_sides(world, device, problem, bench.Inputs(problem, seed=1)):
            side.run(100)
            begin = time.perf_counter()
            milliseconds = np.median(side.run(300) or [np.nan])
            host = (time.perf_counter() - begin) / 302 * 1e3
            if world.rank == 0:
                print(f"{length} {side.name}: {milliseconds:.3f} ms, host and GPU {host:.3f} ms")
            if side.name in ("ring", "allgather", "allgather, head start"):
                with timeline(device) as places:
                    side.run(30)
                    device._gpu.synchronize()
                if world.rank == 0:
                    print_timeline(places)
            if side.name == "ring" and length == 8192:
                profiler = cProfile.Profile()
                profiler.enable()
                side.run(300)
                profiler.disable()
                if world.rank == 0:
                    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    device.close()


def layers(world: World) -> None:
    """Collective. A model of 32 layers as the library sees it: what a call takes of the host."""
    import torch

    torch.cuda.set_device(world.local_rank)
    for length in (8192, 16384):
        shape = (length // world.size, 8, 128)
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        made = mdattn_mpi.Attention(world.comm, x, x, x)
        for ways in ("calls alone", "with projections"):
            host, begin = [], time.perf_counter()
            for layer in range(32 * 8):
                q, k, v = (x, x, x) if ways == "calls alone" else (x * 2, x + 1, x - 1)
                asked = time.perf_counter()
                out = made.start(q, k, v).wait()
                host.append(1e6 * (time.perf_counter() - asked))
                x = x if ways == "calls alone" else (out + x).mul_(0.5)
                if layer % 32 == 31:
                    torch.cuda.synchronize()
                    world.barrier()
            if world.rank == 0:
                each = (time.perf_counter() - begin) / len(host) * 1e3
                few, half, most = np.percentile(host[64:], (10, 50, 90))
                print(
                    f"{length}, {ways}: host {half:.0f} us a call ({few:.0f} to "
                    f"{most:.0f}), all {each:.3f} ms a layer",
                    flush=True,
                )


@contextlib.contextmanager
def timeline(device: Any) -> Iterator[list[tuple[str, Any]]]:
    """Note timed events at the beginning and end of what goes on in each stream."""
    gpu, launches, copies = device._gpu, device.kernels._launches, device._copies
    places: list[tuple[str, Any]] = []
    originals = (launches.get, gpu.merge, gpu.copy, copies.arrival, device.mark)

    def between(name: str, act: Any, *args: Any) -> None:
        places.append((f"{name} begins", gpu.record(args[-1], timed=True)))
        act(*args)
        places.append((f"{name} ends", gpu.record(args[-1], timed=True)))

    def arrival(*args: Any) -> Any:
        found = originals[3](*args)
        places.append(("arrived", found[1]))
        return found

    def mark() -> Any:
        found = originals[4]()
        places.append(("call ends", found))
        return found

    def get(call: Any) -> Any:
        launch = originals[0](call)
        run = partial(between, "attention", launch.run)
        return SimpleNamespace(workspace=launch.workspace, run=run)

    launches.get = get
    gpu.merge = lambda *args: between("merge", originals[1], *args)
    gpu.copy = lambda *args: between("copy", originals[2], *args)
    copies.arrival, device.mark = arrival, mark
    yield places
    launches.get, gpu.merge, gpu.copy, copies.arrival, device.mark = originals


def print_timeline(places: list[tuple[str, Any]]) -> None:
    """Print the median place of everything, in microseconds after the call before has ended."""
    calls: list[list[tuple[str, Any]]] = [[]]
    for place in places:
        calls[-1].append(place)
        if place[0] == "call ends":
            calls.append([])
    found: dict[tuple[int, str], list[float]] = {}
    for before, call in itertools.pairwise(calls[2:-1]):
        for index, (name, event) in enumerate(call):
            found.setdefault((index, name), []).append(1e3 * (event - before[-1][1]))
    for (_, name), times in sorted(found.items(), key=lambda item: np.median(item[1])):
        print(f"    {np.median(times):8.1f} us  {name}")


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["check", "bench"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transfer", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--calls", type=int, default=40, help="in flight, of each kind")
    parser.add_argument("--rows", default="", help="rows of the table to bench, as 0,3,4")
    parser.add_argument("--no-rivals", dest="rivals", action="store_false")
    parser.add_argument("--no-replays", dest="replays", action="store_false")
    parser.add_argument(
        "--stacks", type=float, default=0.0, help="seconds after which to show them"
    )
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    world, wrong = start(), 0
    if arguments.stacks:
        faulthandler.dump_traceback_later(arguments.stacks)
    begin = time.perf_counter()
    if "masks" in arguments.what:
        wrong += check(world, "auto", arguments.kernel, masked_problems())
    if "check" in arguments.what:
        for transfer in ("copy", "nccl") if world.size > 1 else ("auto",):
            wrong += check(
                world,
                transfer,
                arguments.kernel,
                problems() + masked_problems() if transfer != "nccl" else problems()[::5],
            )
        wrong += check_arrays_of_others(world)
    if {"check", "in-flight"} & set(arguments.what):
        wrong += in_flight.check(world, arguments.calls, reference, TOLERANCE)
        print(f"rank {world.rank}: {wrong} wrong, {time.perf_counter() - begin:.1f} s", flush=True)
    if "layers" in arguments.what:
        layers(world)
    if "profile-layers" in arguments.what:
        profiler = cProfile.Profile()
        profiler.runcall(layers, world)
        if world.rank == 0:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(24)
    if "profile" in arguments.what:
        profile(world, arguments.kernel)
    if "million" in arguments.what:
        wrong += million(world, arguments.kernel)
    rows = [int(row) for row in arguments.rows.split(",") if row] or range(len(TABLE))
    table = [TABLE[row] for row in rows] if "bench" in arguments.what else []
    table += LONG if "long" in arguments.what else ()
    todo = [
        AttentionProblem(s, s, q, kv, dim, dim, "bfloat16", mask)  # type: ignore[arg-type]
        for s, q, kv, dim, mask in table
    ]
    todo += [WINDOWED] if "window" in arguments.what else ()
    if todo:
        from mdattn_mpi.bench import attention_cuda as bench

        arguments.json = bool(arguments.json)
        bench.main(world, todo, arguments)
    total = sum(world.allgather(wrong))
    world.end()
    return int(total > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MdattnError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise
