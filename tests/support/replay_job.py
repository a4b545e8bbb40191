"""Recorded steps between processes, on the double: ``python -m tests.support.replay_job FOLDER``.

Every rank is a process with a double of the driver, whose memory lies in files that the others map:
what CUDA IPC does. So a graph of one rank really waits for flags that another one raises.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mdattn_mpi.lockstep import board, watch
from tests.support.fake_gpu import FakeGpu, FakeLibraries, Machine

HANDLE_BYTES = 64
FIRST = 3  # the item whose step is replayed first by both ranks, and which a rank is lost in


class SharedGpu(FakeGpu):
    """A double whose memory other processes can open; it may end its process inside a graph."""

    folder: Path
    fault: int | None = None  # a signal

    def allocate(self, nbytes: int) -> int:
        name = f"{os.getpid()}-{len(self.machine.memory)}"
        with (self.folder / name).open("wb") as file:
            file.truncate(nbytes)
        address = self._map(name)
        self._names()[address] = name
        return address

    def ipc_handle(self, address: int) -> bytes:
        return self._names()[address].encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes) -> int:
        return self._map(handle.rstrip(b"\0").decode())

    def close(self, address: int) -> None:
        pass

    def launch(self, graph: Any, stream: Any) -> None:
        super().launch(graph, stream)
        if self.fault is not None:
            self.machine.until(lambda: bool(self.machine.replays))
            self.machine.step()
            os.kill(os.getpid(), self.fault)

    def _map(self, name: str) -> int:
        with (self.folder / name).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self.machine.memory[address] = mapped
        return address

    def _names(self) -> dict[int, str]:
        found: dict[int, str] = self.__dict__.setdefault("names", {})
        return found


class SharedLibraries(FakeLibraries):
    def __init__(self, folder: Path, gpus: int) -> None:
        super().__init__(Machine(0), gpus)
        self.folder = folder

    def gpu(self, ordinal: int) -> SharedGpu:
        self.opened = SharedGpu(self.machine, ordinal)
        self.opened.folder = self.folder
        return self.opened


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deadline", type=float, default=60.0)
    parser.add_argument("--lose", type=int, help="a signal that rank 1 gets inside a graph")
    arguments = parser.parse_args()
    return watch(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> int:
    board().patience = arguments.deadline
    from mdattn_mpi.devices.cuda.open import open_cuda
    from mdattn_mpi.devices.protocol import run_to_end
    from mdattn_mpi.lockstep import Step, start
    from mdattn_mpi.partition import partition_of
    from mdattn_mpi.problem import AttentionProblem, Plan
    from mdattn_mpi.strategies import STRATEGIES
    from tests.support.group import take
    from tests.support.reference import attention, random_inputs

    world = start()
    world.board.attach(arguments.folder, world.rank, world.size)
    libraries: Any = SharedLibraries(arguments.folder, world.size)
    device: Any = open_cuda(world, seam=libraries)
    problem = AttentionProblem(37, 37, 4, 2, 16, 8, "bfloat16", "upper_left")
    plan = Plan(problem, "ring", world.size)
    owners = partition_of(plan)
    for item in range(6):
        inputs = random_inputs(problem, item)
        right = take(attention(problem, *inputs)[0], owners.query[world.rank])
        spans = (owners.query, owners.kv, owners.kv)
        shards = [take(a, s[world.rank]) for a, s in zip(inputs, spans, strict=False)]
        world.board.enter("agree", f"item-{item}")
        world.agree(Step(item, "begin", plan.digest))
        world.board.enter("enqueue", f"item-{item}")
        if (item, world.rank) == (FIRST, 1) and arguments.lose:
            libraries.opened.fault = arguments.lose
        steps = device.perform(STRATEGIES["ring"], plan, *map(device.upload, shards))
        next(steps)
        output = run_to_end(steps)[0]
        world.board.enter("collect", f"item-{item}")
        found = device.download(output).wait()[0].astype(float)
        assert np.abs(found - right).max() < 0.05
    print(f"replayed {device.steps.describe()}", flush=True)
    device.close()
    world.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
