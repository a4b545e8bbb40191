"""Doctor's collectives over NCCL: judged right and wrong, with doubles of the GPU and of NCCL."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ranks import on_ranks

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World


def words(address: int, nbytes: int) -> np.ndarray:  # type: ignore[type-arg]
    """Memory as an array."""
    return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), np.int64)


class HostGpu:
    """What doctor asks of a GPU, in the host's memory."""

    def __init__(self, ordinal: int) -> None:
        self.kept: list[object] = []

    def stream(self) -> SimpleNamespace:
        return SimpleNamespace(handle=7)

    def allocate(self, nbytes: int) -> int:
        self.kept.append(array := np.zeros(nbytes, np.uint8))
        return int(array.ctypes.data)

    def release(self, address: int) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def copy(self, target: int, source: int, nbytes: int, stream: object) -> None:
        ctypes.memmove(target, source, nbytes)


class MpiInstead:
    """NCCL's part, done by MPI; ``lies`` changes one value on the last rank."""

    library = "2.28.9 (/somewhere/libnccl.so.2)"
    lies = False

    def __init__(self, world: World) -> None:
        self.world = world

    def all_reduce(self, source: int, target: int, count: int, stream: int) -> None:
        assert stream == 7
        received = words(target, 8 * count)
        self.world.comm.Allreduce(words(source, 8 * count).copy(), received)
        if self.lies and self.world.rank == self.world.size - 1:
            received[count // 2] += 1

    def exchange(
        self,
        send: Mapping[int, Sequence[tuple[int, int]]],
        receive: Mapping[int, Sequence[tuple[int, int]]],
        stream: int,
    ) -> None:
        requests = [
            self.world.comm.Isend(words(*messages[0]).copy(), peer)
            for peer, messages in send.items()
        ]
        for peer, messages in receive.items():
            self.world.comm.Recv(words(*messages[0]), peer)
        for request in requests:
            request.Wait()

    def close(self) -> None:
        pass


@on_ranks(1, 2, 3)
def test_what_arrives_is_checked(world: World) -> None:
    driver, nccl = ModuleType("cuda_driver"), ModuleType("nccl")
    driver.Gpu, nccl.NcclComm = HostGpu, MpiInstead  # type: ignore[attr-defined]
    sys.modules["mdattn_mpi.devices.cuda.driver"] = driver
    sys.modules["mdattn_mpi.devices.nccl"] = nccl
    from mdattn_mpi.doctor.network import try_nccl

    found = try_nccl(world, 0)
    assert found["all-reduce"]["right"]
    assert found["all-to-all"]["right"]
    assert found["all-to-all"]["rate"] > 0
    assert "libnccl" in found["library"]["path"]
    MpiInstead.lies = True
    found = try_nccl(world, 0)
    assert found["all-reduce"]["right"] == (world.rank != world.size - 1)
    assert found["all-to-all"]["right"]
