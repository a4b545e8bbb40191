"""Messages of one exchange: sorted by peer, and under way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mdattn_mpi.devices.cuda.copies import Copies
from mdattn_mpi.devices.cuda.gpu import Event
from mdattn_mpi.devices.cuda.memory import DeviceArray
from mdattn_mpi.devices.cuda.order import Fence
from mdattn_mpi.devices.protocol import Message


class Transfer(NamedTuple):
    """Messages under way; keeps their arrays."""

    received: list[DeviceArray]
    kept: list[DeviceArray]
    sent: list[DeviceArray]
    copies: Copies | None
    ends: Fence
    last: Event | None  # a timed event of the last of `ends`; None without any


def by_peer(messages: Sequence[Message[DeviceArray]]) -> dict[int, list[DeviceArray]]:
    """Sort arrays by peer, in order; leave out empty ones."""
    found: dict[int, list[DeviceArray]] = {}
    for array, peer in messages:
        if array.size:
            found.setdefault(peer, []).append(array)
    return found


def before(read: Iterable[DeviceArray], write: Iterable[DeviceArray]) -> list[Fence]:
    """Return what comes before some arrays are read, and others written."""
    return [
        *(array.allocation.written for array in read),
        *(array.allocation.used for array in write),
    ]


def spans(messages: dict[int, list[DeviceArray]]) -> dict[int, list[tuple[int, int]]]:
    """Return addresses and bytes by peer."""
    return {
        peer: [(array.address, array.nbytes) for array in arrays]
        for peer, arrays in messages.items()
    }
