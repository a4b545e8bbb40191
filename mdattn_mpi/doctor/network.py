"""What ranks find out together: that messages arrive, right and fast, and what time it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from mdattn_mpi.lockstep import World, together

ELEMENTS = 1 << 20  # int64 values a rank: 8 MiB
ROUNDS = 3
PINGS = 20

Try = dict[str, Any]


def try_mpi(world: World) -> dict[str, Try]:
    """Collective. Sum and exchange over MPI, and check every value.

    Returns
    -------
    dict
        For ``all-reduce`` and ``all-to-all``: ``right``, and bytes a second that each rank sent.

    """
    comm, size = world.comm, world.size
    part = max(1, ELEMENTS // size)
    values = np.arange(part * size, dtype=np.int64) + world.rank
    sums, exchanged = np.empty_like(values), np.empty_like(values)

    def reduce() -> None:
        comm.Allreduce(values, sums)

    def exchange() -> None:
        comm.Alltoall(values, exchanged)

    return {
        "all-reduce": _timed(world, "all-reduce over MPI", reduce, values.nbytes)
        | {"right": bool((sums == expected_sum(part, size)).all())},
        "all-to-all": _timed(world, "all-to-all over MPI", exchange, values.nbytes)
        | {"right": bool((exchanged == expected_exchange(part, size, world.rank)).all())},
    }


def expected_sum(part: int, size: int) -> Any:
    """What the all-reduce gives: everybody's values are 0, 1, 2, … plus their rank."""
    return np.arange(part * size, dtype=np.int64) * size + size * (size - 1) // 2


def expected_exchange(part: int, size: int, rank: int) -> Any:
    """What the all-to-all gives `rank`: its part of the values of every rank, in rank order."""
    mine = np.arange(part * rank, part * (rank + 1), dtype=np.int64)
    return np.concatenate([mine + other for other in range(size)])


def _timed(world: World, name: str, action: Callable[[], None], nbytes: int) -> Try:
    world.board.enter(f"doctor: {name}")
    seconds = []
    for _ in range(ROUNDS):
        world.barrier()
        start = perf_counter()
        action()
        seconds.append(perf_counter() - start)
    return {"rate": nbytes / min(seconds)}


def try_nccl(world: World, gpu: int) -> dict[str, Try]:
    """Collective. The same over NCCL, each rank on its own GPU.

    Raises
    ------
    MdattnError
        What CUDA or NCCL raised on a rank; the same on all.

    """
    from mdattn_mpi.devices.nccl import NcclComm

    device, stream = together(world, "doctor: GPU", lambda: _open_gpu(gpu))
    size, comm = world.size, NcclComm(world)
    part = max(1, ELEMENTS // size)
    values = np.arange(part * size, dtype=np.int64) + world.rank
    result = np.empty_like(values)
    sent, received = together(
        world,
        "doctor: memory",
        lambda: (device.allocate(values.nbytes), device.allocate(values.nbytes)),
    )
    piece = part * values.itemsize
    device.copy(sent, values.ctypes.data, values.nbytes, stream)

    def reduce() -> None:
        comm.all_reduce(sent, received, values.size, int(stream.handle))
        device.synchronize()

    def exchange() -> None:
        peers = range(size)
        comm.exchange(
            {peer: [(sent + peer * piece, piece)] for peer in peers},
            {peer: [(received + peer * piece, piece)] for peer in peers},
            int(stream.handle),
        )
        device.synchronize()

    def arrived(expected: Any) -> bool:
        device.copy(result.ctypes.data, received, values.nbytes, stream)
        device.synchronize()
        return bool((result == expected).all())

    found = {}
    for name, action, expected in (
        ("all-reduce", reduce, expected_sum(part, size)),
        ("all-to-all", exchange, expected_exchange(part, size, world.rank)),
    ):
        found[name] = _timed(world, f"{name} over NCCL", action, values.nbytes)
        found[name]["right"] = arrived(expected)
    comm.close()
    device.release(sent)
    device.release(received)
    return {**found, "library": {"path": comm.library}}


def _open_gpu(gpu: int) -> tuple[Any, Any]:
    from mdattn_mpi.devices.cuda.driver import Gpu

    device = Gpu(gpu)
    return device, device.stream()


def clock_offset(world: World) -> float:
    """Collective. Seconds by which this rank's clock is ahead of rank 0's, half a ping at worst."""
    world.board.enter("doctor: clocks")
    comm, offset = world.comm, 0.0
    sent, got = np.zeros(1), np.zeros(1)
    for other in range(1, world.size):
        if world.rank == 0:
            for _ in range(PINGS):
                comm.Recv(got, other)
                sent[0] = time.time()
                comm.Send(sent, other)
        elif world.rank == other:
            best = float("inf")
            for _ in range(PINGS):
                before = time.time()
                comm.Send(sent, 0)
                comm.Recv(got, 0)
                after = time.time()
                if after - before < best:
                    best, offset = after - before, (before + after) / 2 - float(got[0])
        world.barrier()
    return offset
