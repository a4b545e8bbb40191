"""A GPU as this room asks it for things; `driver` is one, and tests have a double.

Addresses are integers; a copy may go between any two of them, the host's included. A stream or an
event goes back to none but the GPU that made it, which alone looks inside.
"""

# ruff: noqa: D102
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from mdattn_mpi.devices.cuda.merge import MergeCall

Stream: TypeAlias = Any  # cuda.core's, with its `handle`
Graph: TypeAlias = Any  # what a stream was given, to be launched any number of times
Spans = Mapping[int, Sequence[tuple[int, int]]]  # by peer: addresses and bytes


class View(NamedTuple):
    """Another library's array; `owner` keeps it. Strides are in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any


class Event(Protocol):
    """A place in a stream; timed ones give milliseconds by ``-`` once they are done."""

    @property
    def is_done(self) -> bool:
        """Whether everything before it is done."""
        ...

    def sync(self) -> None:
        """Wait for it; any thread may."""
        ...

    def __sub__(self, earlier: Any, /) -> float: ...


class Gpu(Protocol):
    """What `driver.Gpu` has, where it is described."""

    name: str
    ordinal: int
    sm: tuple[int, int]
    multiprocessors: int
    pci_bus_id: str
    driver: str
    driver_major: int
    library_major: int
    free_bytes: int
    total_bytes: int

    def use(self) -> None: ...
    def synchronize(self) -> None: ...

    def allocate(self, nbytes: int) -> int: ...
    def release(self, address: int) -> None: ...
    def available(self) -> int: ...
    def pinned(self, nbytes: int) -> int: ...
    def release_pinned(self, address: int) -> None: ...

    def stream(self, urgency: int = 0) -> Stream: ...
    def adopt(self, handle: int) -> Stream: ...
    def record(self, stream: Stream, *, timed: bool = False) -> Event: ...
    def wait(self, stream: Stream, event: Any) -> None: ...

    def begin_capture(self, stream: Stream) -> None: ...
    def end_capture(self, stream: Stream) -> Graph: ...
    def launch(self, graph: Graph, stream: Stream) -> None: ...
    def destroy(self, graph: Graph) -> None: ...

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None: ...
    def copy_rows(
        self,
        target: int,
        pitch: int,
        source: int,
        source_pitch: int,
        row: int,
        rows: int,
        on: Stream,
    ) -> None: ...
    def fill(self, target: int, value: int, words: int, stream: Stream) -> None: ...
    def raise_flag(self, address: int, value: int, stream: Stream) -> None: ...
    def await_flag(self, address: int, value: int, stream: Stream) -> None: ...
    def take_flag(self, address: int, stream: Stream) -> None: ...
    def merge(self, call: MergeCall, stream: Stream) -> None: ...

    def reaches(self, pci_bus_id: str) -> bool: ...
    def ipc_handle(self, address: int) -> bytes: ...
    def open(self, handle: bytes) -> int: ...
    def close(self, address: int) -> None: ...
    def view(self, array: Any, stream: Stream | None) -> View: ...


class Network(Protocol):
    """What `nccl.NcclComm` is to a device."""

    library: str

    def exchange(self, send: Spans, receive: Spans, stream: int) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
