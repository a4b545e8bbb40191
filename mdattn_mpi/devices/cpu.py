"""NumPy arrays and MPI: the device that every machine has."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mdattn_mpi.devices.host import Array, HostDevice, libraries, processor
from mdattn_mpi.devices.protocol import Costs, Message

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import Group

PIECE = 1 << 30  # bytes a message: MPI counts in 32 bits with a sign
TAG = 7

# Rough figures of one server core and of shared memory; only their ratios choose a strategy.
FLOPS_PER_THREAD = 6e10
BANDWIDTH = 4e9
LATENCY = 20e-6
MERGE = 4e9
CALL = 50e-6


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

    """

    def __init__(self, comm: Any, threads: int = 1) -> None:
        self.comm = comm
        self.threads = threads
        self._under_way: list[MpiTransfer] = []
        super().__init__(comm.rank, comm.size, threads)

    def exchange(self, send: Sequence[Message], receive: Sequence[Message]) -> MpiTransfer:
        """Collective. Start sending and receiving; `poll` and `wait` keep it going."""
        own, kept = (
            [m.array for m in messages if m.peer == self.rank and m.array.size]
            for messages in (send, receive)
        )
        for source, target in zip(own, kept, strict=True):
            self.copy(source, target)
        requests = [
            self.comm.Irecv(piece, message.peer, TAG) for message, piece in self._pieces(receive)
        ]
        requests += [
            self.comm.Isend(piece, message.peer, TAG) for message, piece in self._pieces(send)
        ]
        transfer = MpiTransfer(requests, [message.array for message in (*send, *receive)])
        self._under_way.append(transfer)
        return transfer

    def wait(self, transfer: MpiTransfer) -> None:
        """Let everything that follows see what `transfer` received."""
        with self.timed("exchange"):
            for request in transfer.requests:
                request.Wait()
        self._under_way.remove(transfer)

    def poll(self) -> None:
        """Keep messages going while the rank computes."""
        for transfer in self._under_way:
            transfer.poll()

    def costs(self) -> Costs:
        """Rough figures; see the constants of this module."""
        return Costs(FLOPS_PER_THREAD, BANDWIDTH, LATENCY, MERGE, CALL)

    def describe(self) -> Mapping[str, str]:
        """The processor, the threads of a rank, and what multiplies matrices."""
        return {"device": processor(), "threads": str(self.threads), **libraries()}

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[Message, memoryview]]:
        """Bytes of each message for another rank, none longer than MPI can count."""
        for message in messages:
            if message.peer != self.rank and message.array.size:
                data = message.array.reshape(-1).view(np.uint8).data
                for start in range(0, len(data), PIECE):
                    yield message, data[start : start + PIECE]


class Place(NamedTuple):
    """What a rank may use of its node, and who else may use it."""

    host: str
    cores: tuple[int, ...]
    ranks: int  # of the job on this host, in this group or another

    @classmethod
    def here(cls, group: Group) -> Place:
        """The place of this rank."""
        return cls(platform.node(), tuple(sorted(os.sched_getaffinity(0))), group.local_size)

    def share(self, group: Sequence[Place]) -> int:
        """How many cores are this rank's own, given the places of all ranks of its group.

        A rank that the launcher bound has its cores to itself; others divide theirs equally among
        all ranks that may run on the same ones. Groups on one host are taken to be alike.
        """
        neighbours = [place for place in group if place.host == self.host]
        rivals = sum(place.cores == self.cores for place in neighbours)
        return max(1, len(self.cores) * len(neighbours) // (rivals * max(1, self.ranks)))


def open_cpu(group: Group, threads: int = 0) -> CpuDevice:
    """Collective. Open this rank's CPU: `threads`, or its share of the cores that it may use."""
    gathered = group.gather_bytes(json.dumps(Place.here(group)).encode())
    together = group.bcast_bytes(b"\n".join(gathered) if gathered is not None else None)
    places = [
        Place(host, tuple(cores), ranks)
        for host, cores, ranks in map(json.loads, together.splitlines())
    ]
    return CpuDevice(group.comm, threads or places[group.rank].share(places))
