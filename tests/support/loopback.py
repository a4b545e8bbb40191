"""All ranks of a group in one process, a thread each: for tests.

What a real device leaves undefined is an error here: touching an array before `wait`, waiting
twice or never, messages that don't match, ranks that exchange unequally often. What is received
reads as NaN until it is waited for.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from mdattn_mpi.devices.cpu.host import Array, HostDevice
from mdattn_mpi.devices.cpu.partial import Partial
from mdattn_mpi.devices.protocol import Device, Message
from mdattn_mpi.partition import Block

T = TypeVar("T")

DEADLINE = 60.0  # seconds


class ProtocolError(AssertionError):
    """A strategy did what `devices.protocol` doesn't allow."""


class LostPeerError(RuntimeError):
    """Another rank failed first; its error is the one to look at."""


class Wire:
    """What is under way between the ranks of one process.

    The n-th message that one rank sends another goes to the n-th place where that one receives,
    as under MPI and NCCL; `send` and `receive` return that n.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._changed = threading.Condition()
        self._messages: dict[tuple[int, int, int], Array] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._expected: Counter[tuple[int, int]] = Counter()
        self._failed = False

    def send(self, source: int, target: int, array: Array) -> int:
        """Leave a message; `array` is the receiver's to keep."""
        with self._changed:
            number = self._sent[source, target]
            self._sent[source, target] += 1
            self._messages[source, target, number] = array
            self._changed.notify_all()
            return number

    def receive(self, source: int, target: int) -> int:
        """Get ready for one more message."""
        with self._changed:
            self._expected[source, target] += 1
            self._changed.notify_all()
            return self._expected[source, target] - 1

    def wait_received(self, source: int, target: int, number: int) -> Array:
        """Wait for a message and take it."""
        key = (source, target, number)
        with self._changed:
            self._wait(lambda: key in self._messages, f"rank {source} sent rank {target} nothing")
            return self._messages.pop(key)

    def wait_sent(self, source: int, target: int, number: int) -> None:
        """Wait until the receiver is ready, as a large message does under MPI."""
        with self._changed:
            self._wait(
                lambda: self._expected[source, target] > number,
                f"rank {target} expected nothing from {source}",
            )

    def fail(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def leftovers(self) -> list[str]:
        """Name the messages that nobody received."""
        with self._changed:
            return [f"{source} -> {target}" for source, target, _ in self._messages]

    def _wait(self, ready: Callable[[], bool], otherwise: str) -> None:
        done = self._changed.wait_for(lambda: self._failed or ready(), self._deadline)
        if not done:
            raise ProtocolError(f"{otherwise} within {self._deadline} s")
        if not ready():
            raise LostPeerError(otherwise)


class Posted(NamedTuple):
    """One message under way: its place on the wire, and what the array held when it was sent."""

    array: Array
    peer: int
    number: int
    checksum: int = 0


@dataclass(eq=False)
class LoopbackTransfer:
    """Messages of one `exchange`."""

    sent: list[Posted] = field(default_factory=list)
    received: list[Posted] = field(default_factory=list)


class LoopbackDevice(HostDevice):
    """A rank that is a thread; `run_ranks` makes them."""

    def __init__(self, rank: int, ranks: int, wire: Wire) -> None:
        super().__init__(rank, ranks)
        self.exchanges = 0
        self._wire = wire
        self._under_way: list[LoopbackTransfer] = []

    def exchange(
        self, send: Sequence[Message[Array]], receive: Sequence[Message[Array]]
    ) -> LoopbackTransfer:
        """Start sending copies; fill with NaN what will be received."""
        for array, peer in (*send, *receive):
            whole = array.flags.c_contiguous or peer == self.rank
            _require(whole, "a message isn't contiguous")
        transfer = LoopbackTransfer()
        self._under_way.append(transfer)
        for array, peer in receive:
            if array.size:
                self._require_writable(array, "to be received into")
                _bytes(array)[...] = 0xFF  # NaN in bfloat16, float16 and float32
                number = self._wire.receive(peer, self.rank)
                transfer.received.append(Posted(array, peer, number))
        for array, peer in send:
            if array.size:
                self._require_readable(array, "sent")
                number = self._wire.send(self.rank, peer, array.copy())
                transfer.sent.append(Posted(array, peer, number, _checksum(array)))
        self.exchanges += 1
        return transfer

    def wait(self, transfer: LoopbackTransfer) -> None:
        """Deliver what was received; check that nothing was touched in the meantime."""
        _require(transfer in self._under_way, "a transfer is waited for that isn't under way")
        with self.timed("exchange"):
            for array, peer, number, _ in transfer.received:
                _require(bool((_bytes(array) == 0xFF).all()), "written before wait: received array")
                message = self._wire.wait_received(peer, self.rank, number)
                _require(
                    (message.shape, message.dtype) == (array.shape, array.dtype),
                    f"rank {peer} sent {message.shape} {message.dtype}, "
                    f"rank {self.rank} expected {array.shape} {array.dtype}",
                )
                array[...] = message
            for array, peer, number, checksum in transfer.sent:
                self._wire.wait_sent(self.rank, peer, number)
                _require(_checksum(array) == checksum, "written before wait: sent array")
        self._under_way.remove(transfer)

    def copy(self, source: Array, target: Array) -> None:
        """Copy, once sure that neither array is on its way."""
        self._require_readable(source, "copied")
        self._require_writable(target, "copied into")
        super().copy(source, target)

    def attend(self, accumulator: Partial, blocks: Sequence[Block], k: Array, v: Array) -> None:
        """Attend, once sure that no array is still to be received and the blocks are allowed."""
        for array in (accumulator.q, k, v):
            self._require_readable(array, "attended to")
        for rows, keys, band in blocks:
            _require(0 <= rows.start < rows.stop <= len(accumulator.q), f"no rows: {rows}")
            _require(0 <= keys.start < keys.stop <= len(k) == len(v), f"no keys: {keys}")
            bounds = [bound for bound in band if bound is not None]
            _require(not bounds or len(keys) >= len(rows), "a band with fewer keys than rows")
            _require(min(bounds, default=0) >= 0, f"a bound below 0: {band}")
        super().attend(accumulator, blocks, k, v)

    def check_done(self) -> None:
        """Require that every transfer has been waited for."""
        _require(not self._under_way, f"{len(self._under_way)} transfers never waited for")

    def _require_readable(self, array: Array, use: str) -> None:
        for transfer in self._under_way:
            _require(not _overlaps(array, transfer.received), f"{use} before wait")

    def _require_writable(self, array: Array, use: str) -> None:
        self._require_readable(array, use)
        for transfer in self._under_way:
            _require(not _overlaps(array, transfer.sent), f"{use} before wait")


_proved: type[Device[Array, LoopbackTransfer, Partial]] = LoopbackDevice  # by mypy


def run_ranks(
    ranks: int,
    function: Callable[[LoopbackDevice], T],
    *,
    device: Callable[[int, int, Wire], LoopbackDevice] = LoopbackDevice,
    deadline: float = DEADLINE,
) -> list[T]:
    """Run `function` of a device on every rank of a group; return what each rank returned.

    Raises
    ------
    BaseException
        The error of the rank that failed first.
    ProtocolError
        Something took longer than `deadline` seconds, or was left undone.

    """
    wire = Wire(deadline)
    devices = [device(rank, ranks, wire) for rank in range(ranks)]
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(devices[rank])
            devices[rank].check_done()
        except BaseException as error:  # raised again below, in the caller's thread
            if not isinstance(error, LostPeerError):
                errors.append(error)
            wire.fail()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * deadline)
    for rank in range(ranks):
        devices[rank].close()
    if errors:
        raise errors[0]
    _require(len(results) == ranks, f"only {sorted(results)} of {ranks} ranks came to an end")
    _require(not wire.leftovers(), f"messages that nobody received: {wire.leftovers()}")
    counts = [device.exchanges for device in devices]
    _require(len(set(counts)) == 1, f"ranks exchanged unequally often: {counts}")
    return [results[rank] for rank in range(ranks)]


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ProtocolError(otherwise)


def _overlaps(array: Array, posted: Sequence[Posted]) -> bool:
    return any(np.may_share_memory(array, busy.array) for busy in posted)


def _bytes(array: Array) -> Array:
    return array.view(np.uint8)  # heads may be some of an array's


def _checksum(array: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(_bytes(array)).data)
