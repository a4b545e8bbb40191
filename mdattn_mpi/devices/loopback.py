"""All ranks of a group in one process, a thread each: for tests.

What a real device leaves undefined is an error here: touching an array before `wait`, waiting
twice or never, messages that don't match, ranks that exchange unequally often. What is received
reads as NaN until it is waited for.
"""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mdattn_mpi.devices.blocked_attention import Partial
from mdattn_mpi.devices.host import Array, HostDevice
from mdattn_mpi.devices.protocol import Message
from mdattn_mpi.problem import Span

T = TypeVar("T")

DEADLINE = 60.0  # seconds


class ProtocolError(AssertionError):
    """A strategy did what `devices.protocol` doesn't allow."""


class LostPeerError(RuntimeError):
    """Another rank failed first; its error is the one to look at."""


class Wire:
    """What is under way between the ranks of one process."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._changed = threading.Condition()
        self._messages: dict[tuple[int, int], deque[Array]] = defaultdict(deque)
        self._expected: dict[tuple[int, int], int] = defaultdict(int)
        self._failed = False

    def send(self, source: int, target: int, array: Array) -> None:
        """Leave a message; `array` is the receiver's to keep."""
        with self._changed:
            self._messages[source, target].append(array)
            self._changed.notify_all()

    def expect(self, source: int, target: int) -> None:
        """Say that the receiver is ready for one more message."""
        with self._changed:
            self._expected[source, target] += 1
            self._changed.notify_all()

    def receive(self, source: int, target: int) -> Array:
        """Wait for the oldest message."""
        messages = self._messages[source, target]
        with self._changed:
            self._wait(lambda: bool(messages), f"rank {source} sent rank {target} nothing")
            return messages.popleft()

    def wait_expected(self, source: int, target: int) -> None:
        """Wait until the receiver is ready, as a large message does under MPI."""
        pair = (source, target)
        with self._changed:
            self._wait(
                lambda: self._expected[pair] > 0, f"rank {target} expected nothing from {source}"
            )
            self._expected[pair] -= 1

    def fail(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def leftovers(self) -> list[str]:
        """Name the messages that nobody received."""
        with self._changed:
            return [f"{s} -> {t}: {len(m)}" for (s, t), m in self._messages.items() if m]

    def _wait(self, ready: Callable[[], bool], otherwise: str) -> None:
        done = self._changed.wait_for(lambda: self._failed or ready(), self._deadline)
        if not done:
            raise ProtocolError(f"{otherwise} within {self._deadline} s")
        if not ready():
            raise LostPeerError(otherwise)


class LoopbackTransfer:
    """Messages of one `exchange`, with what is needed to tell whether they were touched."""

    def __init__(self, send: Sequence[Message], receive: Sequence[Message]) -> None:
        self.send = [Message(*message) for message in send if message.array.size]
        self.receive = [Message(*message) for message in receive if message.array.size]
        self.checksums = [_checksum(message.array) for message in self.send]


class LoopbackDevice(HostDevice):
    """A rank that is a thread; `run_ranks` makes them."""

    def __init__(self, rank: int, ranks: int, wire: Wire) -> None:
        super().__init__(rank, ranks)
        self.exchanges = 0
        self._wire = wire
        self._under_way: list[LoopbackTransfer] = []

    def exchange(self, send: Sequence[Message], receive: Sequence[Message]) -> LoopbackTransfer:
        """Start sending copies; fill with NaN what will be received."""
        for array, _ in (*send, *receive):
            _require(array.flags.c_contiguous, "a message isn't contiguous")
        for array, _ in send:
            self._require_readable(array, "sent")
        transfer = LoopbackTransfer(send, receive)
        self._under_way.append(transfer)
        for position, (array, peer) in enumerate(transfer.receive):
            self._require_writable(array, "to be received into", but=position)
            _bytes(array)[...] = 0xFF  # NaN in bfloat16, float16 and float32
            self._wire.expect(peer, self.rank)
        for array, peer in transfer.send:
            self._wire.send(self.rank, peer, array.copy())
        self.exchanges += 1
        return transfer

    def wait(self, transfer: LoopbackTransfer) -> None:
        """Deliver what was received; check that nothing was touched in the meantime."""
        _require(transfer in self._under_way, "a transfer is waited for that isn't under way")
        with self.timed("exchange"):
            for array, peer in transfer.receive:
                _require(bool((_bytes(array) == 0xFF).all()), "written before wait: received array")
                message = self._wire.receive(peer, self.rank)
                _require(
                    (message.shape, message.dtype) == (array.shape, array.dtype),
                    f"rank {peer} sent {message.shape} {message.dtype}, "
                    f"rank {self.rank} expected {array.shape} {array.dtype}",
                )
                array[...] = message
            for (array, peer), checksum in zip(transfer.send, transfer.checksums, strict=True):
                self._wire.wait_expected(self.rank, peer)
                _require(_checksum(array) == checksum, "written before wait: sent array")
        self._under_way.remove(transfer)

    def copy(self, source: Array, target: Array) -> None:
        """Copy, once sure that neither array is on its way."""
        self._require_readable(source, "copied")
        self._require_writable(target, "copied into")
        super().copy(source, target)

    def attend(self, accumulator: Partial, rows: Span, k: Array, v: Array, causal: bool) -> None:
        """Attend, once sure that no array is still to be received and the block is allowed."""
        for array in (accumulator.q, k, v):
            self._require_readable(array, "attended to")
        _require(len(rows) > 0 and len(k) == len(v) > 0, "a block without rows or keys")
        _require(not causal or len(k) >= len(rows), "a causal block with fewer keys than rows")
        super().attend(accumulator, rows, k, v, causal)

    def check_done(self) -> None:
        """Require that every transfer has been waited for."""
        _require(not self._under_way, f"{len(self._under_way)} transfers never waited for")

    def _require_readable(self, array: Array, use: str) -> None:
        for transfer in self._under_way:
            for coming, _ in transfer.receive:
                _require(not np.may_share_memory(array, coming), f"{use} before wait")

    def _require_writable(self, array: Array, use: str, but: int = -1) -> None:
        for transfer in self._under_way:
            latest = transfer is self._under_way[-1]
            for position, (busy, _) in enumerate((*transfer.receive, *transfer.send)):
                if not (latest and position == but):
                    _require(not np.may_share_memory(array, busy), f"{use} before wait")


def run_ranks(
    ranks: int,
    function: Callable[[Any], T],
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


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def _checksum(array: Array) -> int:
    return zlib.crc32(_bytes(array).data)
