"""Memory of other ranks of the node, opened by CUDA IPC: where this rank's messages may be put.

Only whole blocks can be opened, once each. So a place is a block and where in it, and who shows
places sends along the handles of the blocks that the other rank hasn't opened yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.gpu import Gpu
from mdattn_mpi.devices.cuda.memory import DeviceArray, Memory
from mdattn_mpi.errors import DeviceError

TAG = 11
HANDLE = 8  # 64-bit words of an IPC handle
HEADER = 3
MOST_BLOCKS = 64  # that are shown at a time

Words = NDArray[np.int64]


class Place(NamedTuple):
    """A run of bytes in a block of whoever shows it."""

    block: int
    start: int
    nbytes: int


class Peers:
    """The ranks whose memory this rank can write into, and which can write into its own.

    Parameters
    ----------
    comm
        An mpi4py communicator of the group, for these messages alone.
    gpu, memory
        The driver, and the memory that messages are received into.
    ranks
        The ranks on this node that it reaches, itself left out.

    """

    def __init__(self, comm: Any, gpu: Gpu, memory: Memory, ranks: Sequence[int]) -> None:
        self.comm, self.ranks = comm, tuple(ranks)
        self._gpu, self._memory = gpu, memory
        self._shown = dict.fromkeys(ranks, 0)  # blocks of ours that the peer has opened
        self._opened: dict[int, list[int]] = {peer: [] for peer in ranks}  # its blocks, here
        self._under_way: list[tuple[Any, Words]] = []

    def rotated(self, ranks: Sequence[int]) -> list[int]:
        """Return `ranks` from the next one on: not all of them begin with rank 0."""
        return sorted(ranks, key=lambda peer: (peer - self.comm.rank) % self.comm.size)

    def place_of(self, array: DeviceArray) -> Place:
        """Say where an array lies."""
        piece = array.allocation.piece
        assert piece is not None, "messages are received into memory of our own"
        return Place(piece.block, array.address - self._memory.blocks[piece.block], array.nbytes)

    def show(self, peer: int, places: Sequence[Place], word: int = 0) -> None:
        """Tell `peer` where messages go, in order, and a word; it has to `look`."""
        new = self._memory.blocks[self._shown[peer] :][:MOST_BLOCKS]
        self._shown[peer] += len(new)
        numbers = [len(places), len(new), word, *(n for place in places for n in place)]
        if new:
            numbers += np.frombuffer(b"".join(map(self._gpu.ipc_handle, new)), np.int64).tolist()
        words = np.array(numbers, np.int64)
        self._under_way = [pair for pair in self._under_way if not pair[0].Test()]
        self._under_way.append((self.comm.Isend(words, peer, TAG), words))

    def look(self, peer: int, sizes: Sequence[int]) -> tuple[list[int], int]:
        """Return the addresses that `peer` shows for messages of these sizes, and its word.

        Raises
        ------
        DeviceError
            It expects other messages.

        """
        words = np.empty(HEADER + 3 * len(sizes) + MOST_BLOCKS * HANDLE, np.int64)
        self.comm.Recv(words, peer, TAG)
        count, new, word, *numbers = words[: HEADER + 3 * len(sizes)].tolist()
        if count != len(sizes):
            raise DeviceError(f"rank {peer} expects {count} messages where {len(sizes)} come")
        opened = self._opened[peer]
        if new:
            handles = words[HEADER + 3 * count :][: new * HANDLE].reshape(new, HANDLE)
            opened += [self._gpu.open(handle.tobytes()) for handle in handles]
        addresses = []
        for index, size in enumerate(sizes):
            block, start, nbytes = numbers[3 * index : 3 * index + 3]
            if nbytes != size:
                raise DeviceError(f"rank {peer} expects {nbytes} bytes where {size} come")
            addresses.append(opened[block] + start)
        return addresses, word

    def all_agree(self, good: bool) -> bool:
        """Collective. Whether all ranks say so."""
        answers = np.empty(self.comm.size, np.int64)
        self.comm.Allgather(np.array([good], np.int64), answers)
        return bool(answers.all())

    def close(self) -> None:
        """Close what was opened; nobody may free before all others have."""
        for request, _ in self._under_way:
            request.Wait()
        self.comm.Barrier()
        for address in (address for opened in self._opened.values() for address in opened):
            self._gpu.close(address)
        self._opened.clear()
