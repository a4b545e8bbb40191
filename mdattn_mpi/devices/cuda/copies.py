"""Messages between GPUs of one node by their copy engines: the multiprocessors go on attending.

The receiver tells the sender, over MPI, where each message goes; the sender writes there with peer
copies into memory opened by CUDA IPC. The GPUs keep each other in order by two counters a pair of
ranks, in the memory of whoever waits for them::

    ready    at the sender:   "what your n-th messages go into may be written now"
    arrived  at the receiver: "my n-th messages to you are there"

Counters only grow, and hosts run ahead: nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mdattn_mpi.devices.cuda.gpu import Event, Gpu
from mdattn_mpi.devices.cuda.memory import DeviceArray
from mdattn_mpi.devices.cuda.order import Fence, Queue, is_past, latest
from mdattn_mpi.devices.cuda.peers import HANDLE, Peers, Words

SLOT = 128  # bytes between counters: no two share a cache line
READY, ARRIVED = 0, 1
URGENT = 5

Messages = Mapping[int, Sequence[DeviceArray]]


class Copies(NamedTuple):
    """Messages under way: which numbers to wait for, by peer, and the end of what was sent."""

    expected: dict[int, int]
    sent: Fence


class Carrier(Protocol):
    """What carries messages to near ranks: `PeerCopies`, and `windows.Windows` in a recorded step.

    Attributes
    ----------
    queues
        Its streams.

    """

    queues: tuple[Queue, ...]

    def exchange(self, send: Messages, receive: Messages) -> Copies:
        """Collective. Start sending and receiving contiguous arrays, by peer and in order."""
        ...

    def arrival(self, copies: Copies) -> tuple[Fence, Event]:
        """Return what comes when everything has been received, and a timed event of it."""
        ...

    def close(self) -> None:
        """Collective. Release what there is."""
        ...


class PeerCopies:
    """One rank's copy engines; of use once `connect` was called with what `share` gave.

    Parameters
    ----------
    gpu, peers
        The driver, and the ranks that it reaches.

    """

    def __init__(self, gpu: Gpu, peers: Peers) -> None:
        self._gpu, self._peers, self._comm = gpu, peers, peers.comm
        self._outbox = Queue(gpu, gpu.stream(URGENT))  # copies
        self._inbox = Queue(gpu, gpu.stream(URGENT))  # waits for "arrived"
        self._gate = Queue(gpu, gpu.stream(URGENT))  # says "ready"
        self.queues: tuple[Queue, ...] = (self._outbox, self._inbox, self._gate)
        self._sent, self._received = (dict.fromkeys(peers.ranks, 0) for _ in range(2))
        self._counters = gpu.allocate(2 * self._comm.size * SLOT)
        self._outbox.enqueue(gpu.fill, self._counters, 0, 2 * self._comm.size * SLOT // 4)
        gpu.synchronize()
        self._handle = np.frombuffer(gpu.ipc_handle(self._counters), np.int64)
        self._theirs: dict[int, int] = {}

    def share(self) -> Words:
        """Collective. Return what every rank's counters can be opened by."""
        handles = np.empty((self._comm.size, HANDLE), np.int64)
        self._comm.Allgather(self._handle, handles)
        return handles

    def connect(self, handles: Words) -> None:
        """Open the counters of the peers."""
        self._theirs = {peer: self._gpu.open(handles[peer].tobytes()) for peer in self._peers.ranks}

    def exchange(self, send: Messages, receive: Messages) -> Copies:
        """Collective. Start sending and receiving contiguous arrays, given by peer and in order."""
        for peer, arrays in receive.items():
            self._received[peer] += 1
            self._invite(peer, arrays)
        for peer in self._peers.rotated(list(send)):
            self._sent[peer] += 1
            self._push(peer, send[peer])
        if send:
            self._outbox.mark()
        expected = {peer: self._received[peer] for peer in receive}
        return Copies(expected, self._outbox.now if send else {})

    def arrival(self, copies: Copies) -> tuple[Fence, Event]:
        """Return what comes when everything has been received, and a timed event of it."""
        for peer, number in copies.expected.items():
            self._inbox.enqueue(self._gpu.await_flag, self._own(ARRIVED, peer), number)
        return self._inbox.now, self._inbox.mark(timed=True)

    def close(self) -> None:
        """Collective. Close what was opened; nobody may free before all others have."""
        self._gpu.synchronize()
        self._peers.close()
        for address in self._theirs.values():
            self._gpu.close(address)
        self._comm.Barrier()
        self._gpu.release(self._counters)

    def _invite(self, peer: int, arrays: Sequence[DeviceArray]) -> None:
        """Tell `peer` where its messages go, and its GPU when they may."""
        fence = latest(*(array.allocation.used for array in arrays))
        must_wait = not is_past(fence)
        if must_wait:
            self._gate.wait(fence)
            at = self._at(self._theirs[peer], READY, self._comm.rank)
            self._gate.enqueue(self._gpu.raise_flag, at, self._received[peer])
        self._peers.show(peer, [self._peers.place_of(array) for array in arrays], must_wait)

    def _push(self, peer: int, arrays: Sequence[DeviceArray]) -> None:
        """Copy to where `peer` says, as soon as both sides may."""
        places, must_wait = self._peers.look(peer, [array.nbytes for array in arrays])
        outbox = self._outbox
        outbox.wait(*(array.allocation.written for array in arrays))
        if must_wait:
            outbox.enqueue(self._gpu.await_flag, self._own(READY, peer), self._sent[peer])
        for address, array in zip(places, arrays, strict=True):
            outbox.enqueue(self._gpu.copy, address, array.address, array.nbytes)
        at = self._at(self._theirs[peer], ARRIVED, self._comm.rank)
        outbox.enqueue(self._gpu.raise_flag, at, self._sent[peer])

    def _own(self, kind: int, peer: int) -> int:
        return self._at(self._counters, kind, peer)

    def _at(self, counters: int, kind: int, rank: int) -> int:
        ranks: int = self._comm.size
        return counters + (kind * ranks + rank) * SLOT
