"""Messages of the CPU device between real ranks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mdattn_mpi.devices.cpu import device
from mdattn_mpi.devices.cpu.device import CpuDevice, open_cpu
from mdattn_mpi.mask import FULL
from mdattn_mpi.partition import Block
from mdattn_mpi.problem import Span
from tests.support.ranks import on_ranks

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


def contents(source: int, target: int, number: int, dtype: Any, tokens: int = 50) -> Any:
    """What rank `source` sends rank `target` in its message `number`; any rank can tell."""
    random = np.random.default_rng([source, target, number])
    return random.standard_normal((tokens + number, 2, 3)).astype(dtype)


@on_ranks()
def test_everybody_with_everybody_in_order(world: Any) -> None:
    """Messages to oneself and empty ones among them, of different sizes, three at a time."""
    device = CpuDevice(world.comm)
    everybody = [(peer, number) for number in range(3) for peer in range(world.size)]
    for dtype in DTYPES:
        for tokens in (50, 100_000):  # sent at once, and only when the receiver is ready
            sent = [(contents(device.rank, peer, n, dtype, tokens), peer) for peer, n in everybody]
            received = [(np.zeros((tokens + n, 2, 3), dtype), peer) for peer, n in everybody]
            empty = [(np.zeros((0, 2, 3), dtype), peer) for peer in range(world.size)]
            transfer = device.exchange([*empty, *sent], [*received, *empty])
            device.wait(transfer)
            for (peer, n), (array, _) in zip(everybody, received, strict=True):
                expected = contents(peer, device.rank, n, dtype, tokens)
                assert array.tobytes() == expected.tobytes()
    assert device.seconds["exchange"] > 0
    device.close()


@on_ranks(2, 4)
def test_two_transfers_under_way_keep_their_order(world: Any) -> None:
    device = CpuDevice(world.comm)
    right, left = (device.rank + 1) % world.size, (device.rank - 1) % world.size
    transfers, arrays = [], []
    for number in range(2):
        array = np.zeros((70_000, 2, 3), np.float16)
        array = array[: 50_000 + number]
        arrays.append(array)
        sent = contents(device.rank, right, number, np.float16, 50_000)
        transfers.append(device.exchange([(sent, right)], [(array, left)]))
    for number in (1, 0):  # waited for in any order
        device.wait(transfers[number])
        expected = contents(left, device.rank, number, np.float16, 50_000)
        assert arrays[number].tobytes() == expected.tobytes()
    device.close()


@on_ranks(1, 3)
def test_long_messages_are_cut(world: Any) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(device, "PIECE", 1000)
        test_everybody_with_everybody_in_order.body(world)


@on_ranks(2, 3)
def test_messages_arrive_while_the_rank_computes(world: Any) -> None:
    """The message is larger than MPI sends unasked; `attend` alone must bring it across."""
    device = CpuDevice(world.comm, 2)
    right, left = (device.rank + 1) % world.size, (device.rank - 1) % world.size
    sent = contents(device.rank, right, 0, np.float16, 200_000)
    received = np.zeros_like(sent)
    transfer = device.exchange([(sent, right)], [(received, left)])
    q = np.ones((64, 1, 8), np.float16)
    keys = np.ones((512, 1, 8), np.float16)
    accumulator = device.accumulator(q, 8, 1.0)
    while transfer.requests:  # a hang here is a failure: nothing else calls MPI
        device.attend(accumulator, [Block(Span(0, 64), Span(0, 512), FULL)], keys, keys)
    device.wait(transfer)
    assert received.tobytes() == contents(left, device.rank, 0, np.float16, 200_000).tobytes()
    assert (device.finish(accumulator)[0] == 1).all()
    assert all(device.seconds[phase] > 0 for phase in ("compute", "exchange", "merge"))
    device.close()


@on_ranks()
def test_a_rank_gets_its_share_of_the_cores(world: Any) -> None:
    import os

    cores = len(os.sched_getaffinity(0))
    assert open_cpu(world).threads == max(1, cores // world.size)
    assert open_cpu(world, 3).threads == 3
