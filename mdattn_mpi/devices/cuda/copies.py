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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.gpu import Event, Gpu
from mdattn_mpi.devices.cuda.memory import DeviceArray, Memory
from mdattn_mpi.devices.cuda.order import Fence, Queue, is_past, latest
from mdattn_mpi.errors import DeviceError

TAG = 11
SLOT = 128  # bytes between counters: no two share a cache line
HANDLE = 8  # 64-bit words of an IPC handle
HEADER = 3
MOST_BLOCKS = 64  # that one invitation shows
READY, ARRIVED = 0, 1
URGENT = 5

Words = NDArray[np.int64]
Messages = Mapping[int, Sequence[DeviceArray]]


class Copies(NamedTuple):
    """Messages under way: which numbers to wait for, by peer, and the end of what was sent."""

    expected: dict[int, int]
    sent: Fence


class PeerCopies:
    """One rank's copy engines; of use once `connect` was called with what `share` gave.

    Parameters
    ----------
    comm
        An mpi4py communicator of the group, for these messages alone.
    gpu, memory
        The driver, and the memory that messages are received into.
    peers
        The ranks on this node that it reaches, itself left out.

    """

    def __init__(self, comm: Any, gpu: Gpu, memory: Memory, peers: Sequence[int]) -> None:
        self._comm = comm
        self._gpu = gpu
        self._memory = memory
        self._outbox = Queue(gpu, gpu.stream(URGENT))  # copies
        self._inbox = Queue(gpu, gpu.stream(URGENT))  # waits for "arrived"
        self._gate = Queue(gpu, gpu.stream(URGENT))  # says "ready"
        self._sent, self._received = dict.fromkeys(peers, 0), dict.fromkeys(peers, 0)
        self._shown = dict.fromkeys(peers, 0)  # blocks of ours that the peer has opened
        self._opened: dict[int, list[int]] = {peer: [] for peer in peers}  # its blocks, here
        self._under_way: list[tuple[Any, Words]] = []
        self._counters = gpu.allocate(2 * comm.size * SLOT)
        self._outbox.enqueue(gpu.fill, self._counters, 0, 2 * comm.size * SLOT // 4)
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
        self._theirs = {peer: self._gpu.open(handles[peer].tobytes()) for peer in self._opened}

    def exchange(self, send: Messages, receive: Messages) -> Copies:
        """Collective. Start sending and receiving contiguous arrays, given by peer and in order."""
        for peer, arrays in receive.items():
            self._received[peer] += 1
            self._invite(peer, arrays)
        rotated = sorted(send, key=lambda peer: (peer - self._comm.rank) % self._comm.size)
        for peer in rotated:  # not all of them to rank 0 first
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
        for request, _ in self._under_way:
            request.Wait()
        self._comm.Barrier()
        for address in (*(a for opened in self._opened.values() for a in opened),
                        *self._theirs.values()):  # fmt: skip
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
        new = self._memory.blocks[self._shown[peer] :][:MOST_BLOCKS]
        self._shown[peer] += len(new)
        numbers = [len(arrays), len(new), must_wait]
        for array in arrays:
            numbers += self._where(array)
        if new:
            numbers += np.frombuffer(b"".join(map(self._gpu.ipc_handle, new)), np.int64).tolist()
        words = np.array(numbers, np.int64)
        self._under_way = [pair for pair in self._under_way if not pair[0].Test()]
        self._under_way.append((self._comm.Isend(words, peer, TAG), words))

    def _push(self, peer: int, arrays: Sequence[DeviceArray]) -> None:
        """Copy to where `peer` says, as soon as both sides may."""
        places, must_wait = self._read_invitation(peer, len(arrays))
        outbox = self._outbox
        outbox.wait(*(array.allocation.written for array in arrays))
        if must_wait:
            outbox.enqueue(self._gpu.await_flag, self._own(READY, peer), self._sent[peer])
        opened = self._opened[peer]
        for index, array in enumerate(arrays):
            block, start, nbytes = places[3 * index : 3 * index + 3]
            if nbytes != array.nbytes:
                raise DeviceError(f"rank {peer} expects {nbytes} bytes where {array.nbytes} come")
            outbox.enqueue(self._gpu.copy, opened[block] + start, array.address, nbytes)
        at = self._at(self._theirs[peer], ARRIVED, self._comm.rank)
        outbox.enqueue(self._gpu.raise_flag, at, self._sent[peer])

    def _read_invitation(self, peer: int, messages: int) -> tuple[list[int], bool]:
        """Receive what `_invite` wrote on `peer`; open the blocks that it shows."""
        words = np.empty(HEADER + 3 * messages + MOST_BLOCKS * HANDLE, np.int64)
        self._comm.Recv(words, peer, TAG)
        count, new, must_wait, *places = words[: HEADER + 3 * messages].tolist()
        if count != messages:
            raise DeviceError(f"rank {peer} expects {count} messages where {messages} come")
        if new:
            handles = words[HEADER + 3 * count :][: new * HANDLE].reshape(new, HANDLE)
            self._opened[peer] += [self._gpu.open(handle.tobytes()) for handle in handles]
        return places, bool(must_wait)

    def _where(self, array: DeviceArray) -> tuple[int, int, int]:
        piece = array.allocation.piece
        assert piece is not None, "messages are received into memory of our own"
        start = array.address - self._memory.blocks[piece.block]
        return piece.block, start, array.nbytes

    def _own(self, kind: int, peer: int) -> int:
        return self._at(self._counters, kind, peer)

    def _at(self, counters: int, kind: int, rank: int) -> int:
        ranks: int = self._comm.size
        return counters + (kind * ranks + rank) * SLOT
