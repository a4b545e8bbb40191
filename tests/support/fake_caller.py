"""Doubles of libraries that call us with arrays on the GPU, and don't wait for anything.

A `Caller` has streams of its own, which run in random order against ours. Its arrays hold poison
until its stream has come to writing them, and again from where its stream has come to freeing them:
an allocator such as PyTorch's gives a block to the next array of the same stream at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mdattn_mpi.devices.cuda import interop
from mdattn_mpi.devices.cuda.gpu import View
from mdattn_mpi.devices.cuda.interop import Library
from tests.support.fake_gpu import Machine, Stream

BUSY = 24  # things, at most, that a stream does before it writes or reads an array


class Tensor:
    """An array of a caller's, in its own memory or in ours.

    Parameters
    ----------
    caller, stream
        Whose, and where it is written.
    memory
        ``[tokens, heads, dim]``, any strides.
    lender
        What keeps memory of ours; then `stream` has waited for it.

    """

    def __init__(self, caller: Caller, stream: Stream, memory: Any, lender: Any = None) -> None:
        self.caller, self.stream, self.memory, self.lender = caller, stream, memory, lender
        self.shape, self.dtype = memory.shape, memory.dtype
        self.written = caller.event(stream)

    def view(self, stream: Stream | None) -> View:
        """What the driver's `view` finds; `stream` waits as by ``__dlpack__``."""
        if stream is not None:
            written = self.written if self.caller.hides else self.caller.event(self.caller.current)
            stream.push(lambda: None, lambda: bool(written))
        strides = tuple(step // self.memory.itemsize for step in self.memory.strides)
        return View(self.memory.ctypes.data, self.shape, strides, self.dtype, self)

    def read(self) -> Any:
        """Enqueue reading it; the array that is returned fills when the stream gets there."""
        found = np.full(self.shape, np.nan, np.float64)
        memory = self.memory
        self.caller.busy()
        if self.caller.hides:
            written = self.written
            self.caller.current.push(lambda: None, lambda: bool(written))
        self.caller.current.push(lambda: np.copyto(found, memory.astype(np.float64)))
        return found

    def overwrite(self) -> None:
        """Enqueue filling it with poison, if the library can."""
        if self.caller.hides:
            return
        memory = self.memory
        self.caller.current.push(lambda: poison(memory))

    def __del__(self) -> None:
        if self.lender is None:  # in order of the stream that wrote it, and of nothing else
            memory = self.memory
            self.stream.push(lambda: poison(memory))


class Caller:
    """A library, in one process.

    Parameters
    ----------
    machine
        The GPUs.
    hides
        Whether it doesn't show its stream, as JAX, whose arrays are never written twice.

    """

    def __init__(self, machine: Machine, hides: bool = False) -> None:
        self.machine, self.hides = machine, hides
        self.current = Stream(machine)
        self.sides = (self.current.handle, Stream(machine).handle)
        self.ready = Stream(machine)  # what it waits with for others, where it hides its own

    def library(self) -> Library:
        """What `interop` has to know of it."""
        if self.hides:
            return Library(self.from_dlpack, latest=lambda: self.array(np.zeros((1, 1, 8))))
        return Library(self.from_dlpack, lambda: (self.current.handle, self.current))

    def busy(self) -> None:
        """Give the stream something to do that nobody looks at."""
        for _ in range(self.machine.random.randrange(BUSY)):
            self.current.push(lambda: None)

    def array(self, values: Any, stride: int = 1) -> Tensor:
        """Take memory, and enqueue writing `values` into it; every `stride`-th head is used."""
        tokens, heads, dim = values.shape
        whole = np.empty((tokens, heads * stride, dim), values.dtype)
        poison(whole)
        memory = whole[:, ::stride]
        self.busy()
        self.current.push(lambda: np.copyto(memory, values))
        return Kind(self, self.current, memory)

    def from_dlpack(self, exported: Any) -> Tensor:
        """Take an array of ours."""
        array = exported.array
        waiting = self.ready if self.hides else self.current
        capsule = exported.__dlpack__(stream=waiting.handle)
        buffer = (ctypes.c_ubyte * array.nbytes).from_address(array.address)
        memory = np.frombuffer(buffer, np.uint8).view(array.dtype).reshape(array.shape)
        return Kind(self, waiting, memory, capsule)

    def event(self, stream: Stream) -> list[bool]:
        """Something that is true once `stream` has done what it has been given so far."""
        event: list[bool] = []
        stream.push(lambda: event.append(True))
        return event


class Kind(Tensor):
    """The class of arrays, by whose module `interop` tells libraries apart."""

    __module__ = "fake_library.arrays"


def poison(memory: Any) -> None:
    """Fill with NaN."""
    memory[...] = np.nan


@contextmanager
def known(callers: dict[int, Caller]) -> Iterator[None]:
    """Make the callers known, each on the GPU of its rank."""
    interop.LIBRARIES["fake_library"] = lambda ordinal: callers[ordinal].library()
    try:
        yield
    finally:
        del interop.LIBRARIES["fake_library"]
