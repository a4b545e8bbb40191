"""NumPy arrays and MPI: the device that every machine has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mdattn_mpi.costs import Costs, cpu_costs
from mdattn_mpi.devices.cpu.host import Array, HostDevice, libraries, processor
from mdattn_mpi.devices.protocol import Message
from mdattn_mpi.lockstep import board

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import Group
    from mdattn_mpi.problem import AttentionProblem

PIECE = 1 << 30  # bytes a message: MPI counts in 32 bits with a sign
TAG = 7


@dataclass(eq=False)
class MpiTransfer:
    """Requests under way, and the arrays that they read and write."""

    requests: list[Any]
    arrays: list[Array]

    def poll(self) -> bool:
        """Let MPI move data, which it does only when it is called; True when all is there."""
        self.requests = [request for request in self.requests if not request.Test()]
        return not self.requests


class CpuDevice(HostDevice):
    """One rank's cores, and the other ranks over MPI.

    Parameters
    ----------
    comm
        An mpi4py communicator of the group.
    threads
        Threads that compute.
    node_size
        See `estimate.Costs`.

    """

    def __init__(self, comm: Any, threads: int = 1, node_size: int = 1) -> None:
        self.comm = comm
        self.threads = threads
        self._node_size = node_size
        self._under_way: list[MpiTransfer] = []
        super().__init__(comm.rank, comm.size, threads)

    def exchange(
        self, send: Sequence[Message[Array]], receive: Sequence[Message[Array]]
    ) -> MpiTransfer:
        """Collective. Start sending and receiving; `poll` and `wait` keep it going."""
        own, kept = (
            [array for array, peer in messages if peer == self.rank and array.size]
            for messages in (send, receive)
        )
        for source, target in zip(own, kept, strict=True):
            self.copy(source, target)
        requests = [self.comm.Irecv(piece, peer, TAG) for peer, piece in self._pieces(receive)]
        requests += [self.comm.Isend(piece, peer, TAG) for peer, piece in self._pieces(send)]
        transfer = MpiTransfer(requests, [array for array, _ in (*send, *receive)])
        self._under_way.append(transfer)
        return transfer

    def wait(self, transfer: MpiTransfer) -> None:
        """Let everything that follows see what `transfer` received."""
        with self.timed("exchange"), board().waiting():
            for request in transfer.requests:
                request.Wait()
        self._under_way.remove(transfer)

    def poll(self) -> None:
        """Keep messages going while the rank computes."""
        for transfer in self._under_way:
            transfer.poll()

    def costs(self, problem: AttentionProblem) -> Costs:
        """Rough figures of a core, however many the rank has: alike on all ranks."""
        return cpu_costs(node_size=self._node_size)

    def describe(self) -> Mapping[str, str]:
        """The processor, the threads of a rank, and what multiplies matrices."""
        return {"device": processor(), "threads": str(self.threads), **libraries()}

    def _pieces(self, messages: Sequence[Message[Array]]) -> Iterator[tuple[int, memoryview]]:
        """Bytes of each message for another rank, none longer than MPI can count."""
        for array, peer in messages:
            if peer != self.rank and array.size:
                data = array.reshape(-1).view(np.uint8).data
                for start in range(0, len(data), PIECE):
                    yield peer, data[start : start + PIECE]


def open_cpu(group: Group, threads: int = 0) -> CpuDevice:
    """Collective. Open the CPU of this rank: `threads`, or its share of the node's cores."""
    return CpuDevice(group.comm, threads or group.cores, group.node_size())
