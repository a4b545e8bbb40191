"""Messages of a recorded step between GPUs of one node: addresses are agreed on once, with it.

Two flags a pair of ranks keep the GPUs in order, in the memory of whoever waits for them::

    ready    at the sender:   "what your next messages go into may be written now"
    arrived  at the receiver: "my next messages to you are there"

One side raises a flag, the other waits for it and takes it back, so that a step is the same every
time. All of it is in one stream: each rank first says "ready", then sends, then waits. However a
GPU orders what doesn't depend on one another, no two ranks can wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mdattn_mpi.devices.cuda.copies import ARRIVED, READY, SLOT, URGENT, Copies, Messages
from mdattn_mpi.devices.cuda.gpu import Event, Gpu
from mdattn_mpi.devices.cuda.memory import DeviceArray
from mdattn_mpi.devices.cuda.order import Fence, Queue
from mdattn_mpi.devices.cuda.peers import Peers, Place


@dataclass(eq=False)
class Route:
    """Where the messages of one step go.

    Attributes
    ----------
    flags
        This rank's, and by peer the peer's.
    coming
        Where this rank receives, by peer and in order.
    sizes
        Of what it sends, in bytes, by peer and in order.
    going
        The addresses for that, once they are known.

    """

    flags: DeviceArray
    their_flags: dict[int, int] = field(default_factory=dict)
    coming: dict[int, list[Place]] = field(default_factory=dict)
    sizes: dict[int, list[int]] = field(default_factory=dict)
    going: dict[int, list[int]] | None = None


class Windows:
    """What carries messages while steps are recorded; a `copies.Carrier`.

    Parameters
    ----------
    gpu, peers
        The driver, and the ranks that it reaches.

    """

    def __init__(self, gpu: Gpu, peers: Peers) -> None:
        self._gpu, self._peers = gpu, peers
        self._line = Queue(gpu, gpu.stream(URGENT))
        self.queues: tuple[Queue, ...] = (self._line,)
        self._route: Route
        self._going: dict[int, Iterator[int]] = {}
        self._open: list[Copies] = []  # that nobody has waited for

    @property
    def flag_bytes(self) -> int:
        """Bytes of a rank's flags for one step."""
        return 2 * int(self._peers.comm.size) * SLOT

    def start(self, route: Route) -> None:
        """Begin to record a step. Until its addresses are agreed on, its messages go nowhere."""
        self._route, self._open = route, []
        if route.going is None:
            route.coming = {peer: [] for peer in self._peers.ranks}
            route.sizes = {peer: [] for peer in self._peers.ranks}
        else:
            self._going = {peer: iter(places) for peer, places in route.going.items()}

    def agree(self, route: Route) -> None:
        """Collective. Tell all peers where to send, and hear the same of them."""
        flags = self._peers.place_of(route.flags)
        for peer, places in route.coming.items():
            self._peers.show(peer, [flags, *places])
        route.going = {}
        for peer, sizes in route.sizes.items():
            (theirs, *going), _ = self._peers.look(peer, [flags.nbytes, *sizes])
            route.their_flags[peer], route.going[peer] = theirs, going

    def exchange(self, send: Messages, receive: Messages) -> Copies:
        """See `copies.Carrier`."""
        line, gpu, me = self._line, self._gpu, self._peers.comm.rank
        for arrays in receive.values():
            line.wait(*(array.allocation.used for array in arrays))
        for peer, arrays in receive.items():
            line.enqueue(gpu.raise_flag, self._at(self._theirs(peer), READY, me), 1)
            if self._route.going is None:
                self._route.coming[peer] += map(self._peers.place_of, arrays)
        for peer in self._peers.rotated(list(send)):
            line.wait(*(array.allocation.written for array in send[peer]))
            self._take(READY, peer)
            for array in send[peer]:
                line.enqueue(gpu.copy, self._target(peer, array), array.address, array.nbytes)
            line.enqueue(gpu.raise_flag, self._at(self._theirs(peer), ARRIVED, me), 1)
        copies = Copies(dict.fromkeys(receive, 1), line.now if send else {})
        self._open.append(copies)
        return copies

    def arrival(self, copies: Copies) -> tuple[Fence, Event]:
        """See `copies.Carrier`."""
        self._open.remove(copies)
        for peer in copies.expected:
            self._take(ARRIVED, peer)
        return self._line.now, self._line.mark(timed=True)

    def settle(self) -> None:
        """Wait for everything here: nobody need wait for it in what is recorded from now on."""
        for copies in self._open[:]:
            self.arrival(copies)
            copies.expected.clear()

    def close(self) -> None:
        """See `copies.Carrier`: nothing is its own."""

    def _take(self, kind: int, peer: int) -> None:
        """Wait for a flag, and take it back."""
        self._line.enqueue(self._gpu.take_flag, self._at(self._route.flags.address, kind, peer))

    def _target(self, peer: int, array: DeviceArray) -> int:
        if self._route.going is None:
            self._route.sizes[peer].append(array.nbytes)
            return array.address
        return next(self._going[peer])

    def _theirs(self, peer: int) -> int:
        """Find the flags of a peer; before they are agreed on, any address."""
        return self._route.their_flags.get(peer, self._route.flags.address)

    def _at(self, flags: int, kind: int, rank: int) -> int:
        ranks: int = self._peers.comm.size
        return flags + (kind * ranks + rank) * SLOT
