"""A double of an NCCL communicator: messages go once both streams have come to them."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.fake_gpu import Machine
from tests.support.fake_group import FakeGroup

Spans = Mapping[int, Sequence[tuple[int, int]]]


class FakeNccl:
    """What `devices.nccl.NcclComm` is to a device; all ranks are in one process."""

    library = "double"

    def __init__(self, machine: Machine, group: FakeGroup) -> None:
        self.machine, self.rank = machine, group.rank
        self.slots: dict[Any, Any] = group.comm.shared.setdefault("nccl", {})
        self.numbers: Counter[tuple[int, int]] = Counter()

    def exchange(self, send: Spans, receive: Spans, stream: int) -> None:
        queue, slots = self.machine.streams[stream], self.slots
        arrivals = [(slot, spans) for slot, spans in self._numbered(receive, inwards=True)]
        leaving = [(slot, spans) for slot, spans in self._numbered(send, inwards=False)]

        def show() -> None:
            slots.update({("sent", slot): spans for slot, spans in leaving})

        def take() -> None:
            for slot, spans in arrivals:
                for (source, size), (target, room) in zip(slots["sent", slot], spans, strict=True):
                    assert size == room
                    ctypes.memmove(target, source, size)
                slots["taken", slot] = True

        queue.push(show)
        queue.push(take, lambda: all(("sent", slot) in slots for slot, _ in arrivals))
        queue.push(lambda: None, lambda: all(("taken", slot) in slots for slot, _ in leaving))

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def _numbered(self, spans: Spans, *, inwards: bool) -> Any:
        for peer, messages in spans.items():
            pair = (peer, self.rank) if inwards else (self.rank, peer)
            self.numbers[pair] += 1
            yield (*pair, self.numbers[pair]), messages
