"""Arrays of other libraries on this GPU: who waits for whom where they come in and go out.

Neither the host nor the caller waits; for the caller it is as if all kernels of a call ran in its
own current stream, at the place of the call.

- What comes in is read after all that the caller's stream had been given before.
- The caller's stream goes on after our last look at it: it may overwrite or free it at once.
- What goes out is written before the caller's stream goes on.
- The memory of what the caller lets go of is used again after all that its stream had been given
  by then.

PyTorch and CuPy have a current stream. JAX shows none, and its arrays are never overwritten: they
are kept until we have read them, our streams wait through ``__dlpack__``, and what JAX still does
with an output is over when a small array is that JAX was asked for afterwards. Other libraries get
what DLPack offers: they wait for the stream that they say, and the host waits for our last look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from mdattn_mpi.devices.cuda.dlpack import Borrowed, capsule
from mdattn_mpi.devices.cuda.gpu import Event, Gpu, Stream, View
from mdattn_mpi.devices.cuda.memory import Allocation, DeviceArray
from mdattn_mpi.devices.cuda.order import Fence, Held, Queue, events

LEGACY_STREAM = 1  # DLPack's name for CUDA's default stream


@dataclass(frozen=True)
class Library:
    """What has to be known of a library.

    Parameters
    ----------
    from_dlpack
        Takes an array.
    current
        Gives the handle of the stream that it would use now, and an object that keeps the stream
        alive; None where it says neither.
    latest
        Gives an array that is there only after all that the library has asked for so far.

    """

    from_dlpack: Callable[[Any], Any] = lambda exported: exported
    current: Callable[[], tuple[int, Any]] | None = None
    latest: Callable[[], Any] | None = None


def _torch(ordinal: int) -> Library:
    torch = import_module("torch")

    def current() -> tuple[int, Any]:
        stream = torch.cuda.current_stream(ordinal)
        return stream.cuda_stream or LEGACY_STREAM, stream

    return Library(torch.from_dlpack, current)


def _cupy(ordinal: int) -> Library:
    cupy = import_module("cupy")

    def current() -> tuple[int, Any]:
        stream = cupy.cuda.get_current_stream()
        return stream.ptr or LEGACY_STREAM, stream

    return Library(cupy.from_dlpack, current)


def _jax(ordinal: int) -> Library:
    jax = import_module("jax")
    gpu = next(gpu for gpu in jax.local_devices(backend="cuda") if gpu.local_hardware_id == ordinal)
    seed = jax.device_put(0, gpu)
    next_one = jax.jit(lambda number: number + 1)  # computed where everything is, in order
    return Library(import_module("jax.dlpack").from_dlpack, latest=lambda: next_one(seed))


LIBRARIES: dict[str, Callable[[int], Library]] = {
    "torch": _torch,
    "cupy": _cupy,
    "jax": _jax,
    "jaxlib": _jax,
}


class Caller(Protocol):
    """A library, or one of its streams, that calls us.

    Attributes
    ----------
    readers
        Everything that it still does with our arrays is in these, once they `Queue.advance`.

    """

    library: Library
    readers: list[Queue]

    def view(self, array: Any) -> tuple[View, Fence]:
        """Look at an array; what is found, and what comes before it may be read."""
        ...

    def wait(self, *fences: Fence) -> bool:
        """Let what it does from now on come after `fences`; False where it has to be told later."""
        ...

    def give_back(self, allocation: Allocation) -> None:
        """Let it go on after our last look at an array of its own."""
        ...


class StreamCaller:
    """A stream that its library shows.

    It is given nothing but waits. What the library may have given it is counted.
    """

    def __init__(self, gpu: Gpu, library: Library, handle: int, owner: Any) -> None:
        self._gpu, self.library, self.handle = gpu, library, handle
        self._stream = Queue(gpu, gpu.adopt(handle), owner)
        self.readers = [self._stream]

    def view(self, array: Any) -> tuple[View, Fence]:
        """See `Caller`."""
        return self._gpu.view(array, None), self._stream.advance()

    def wait(self, *fences: Fence) -> bool:
        """See `Caller`."""
        self._stream.wait(*fences)
        return True

    def give_back(self, allocation: Allocation) -> None:
        """See `Caller`."""
        self._stream.wait(allocation.used)


class HiddenCaller:
    """A library that shows no stream: it makes a stream of ours wait."""

    def __init__(self, gpu: Gpu, library: Library) -> None:
        self._gpu, self.library = gpu, library
        self._arrivals = Queue(gpu, gpu.stream())
        self.readers: list[Queue] = [_Latest(gpu, library.latest)] if library.latest else []
        self._held = Held()

    def view(self, array: Any) -> tuple[View, Fence]:
        """See `Caller`."""
        self._held.let_go()
        found = self._arrivals.enqueue(self._gpu.view, array)
        self._arrivals.mark()
        return found, self._arrivals.now

    def wait(self, *fences: Fence) -> bool:
        """See `Caller`."""
        return False

    def give_back(self, allocation: Allocation) -> None:
        """See `Caller`: an array that nobody overwrites is kept, for others the host waits."""
        if self.library.latest:
            self._held.hold(allocation, allocation.used)
        else:
            for event in events(allocation.used):
                event.sync()


class _Latest(Queue):
    """A stream of ours that can be made to come after all that a library was asked for so far."""

    def __init__(self, gpu: Gpu, latest: Callable[[], Any]) -> None:
        super().__init__(gpu, gpu.stream())
        self._latest = latest

    def mark(self, *, timed: bool = False) -> Event:
        """Record an event of all that the library was asked for so far."""
        self._gpu.view(self._latest(), self._stream)
        return super().mark(timed=timed)


class Interop:
    """The way of arrays from other libraries and to them, on one GPU.

    Parameters
    ----------
    gpu
        See `gpu.Gpu`.

    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._libraries: dict[str, Library] = {}
        self._hidden: dict[str, HiddenCaller] = {}
        self._kind: type = object  # of what was adopted last
        self._caller: Caller | None = None
        self._lent: list[tuple[Caller, Allocation]] = []

    def lend(self, stream: Stream) -> None:
        """Let what computes in `stream`, and shows its arrays as `Borrowed`, be known as a library.

        What it is given are device arrays as they are.
        """
        current = lambda: (int(stream.handle), stream)  # noqa: E731 a value of `Library`
        self._kind = Borrowed
        self._libraries[_name_of(Borrowed)] = Library(lambda exported: exported.array, current)

    def adopt(self, array: Any) -> DeviceArray:
        """Take an array of another library as it is."""
        self._kind = type(array)
        caller = self._caller = self._caller_of(self._kind)
        (address, shape, strides, dtype, owner), arrived = caller.view(array)
        allocation = Allocation(address, owner=owner)
        allocation.wrote(arrived)
        self._lent.append((caller, allocation))
        return DeviceArray(allocation, shape, dtype, strides)

    def export(self, array: DeviceArray) -> Any:
        """Give an array to the library that an array was last adopted from, in its stream of now.

        All that was adopted so far is its own again.
        """
        caller, allocation = self._caller_of(self._kind), array.allocation
        self._caller = caller
        caller.wait(allocation.written)  # first, for it comes after most of what was lent
        for lender, lent in self._lent:
            for each in {lender, caller}:
                each.give_back(lent)
        self._lent.clear()
        allocation.consumers += [
            queue for queue in caller.readers if queue not in allocation.consumers
        ]
        return caller.library.from_dlpack(Exported(self._gpu, array, caller))

    def _caller_of(self, kind: type) -> Caller:
        name = _name_of(kind)
        library = self._libraries.get(name)
        if library is None:
            known = LIBRARIES.get(name)
            library = self._libraries[name] = known(self._gpu.ordinal) if known else Library()
        if library.current is None:
            if name not in self._hidden:
                self._hidden[name] = HiddenCaller(self._gpu, library)
            return self._hidden[name]
        handle, owner = library.current()
        last = self._caller  # it keeps its stream alive: the same handle is the same stream
        if isinstance(last, StreamCaller) and (last.library, last.handle) == (library, handle):
            return last
        return StreamCaller(self._gpu, library, handle, owner)


def _name_of(kind: type) -> str:
    """Return the package that a class of arrays comes from."""
    return kind.__module__.partition(".")[0]


class Exported:
    """A device array as other libraries take it."""

    def __init__(self, gpu: Gpu, array: DeviceArray, caller: Caller) -> None:
        self._gpu = gpu
        self.array = array
        self._caller = caller

    def __dlpack_device__(self) -> tuple[int, int]:
        """CUDA, and which GPU."""
        return 2, self._gpu.ordinal

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """Let the consumer's stream wait for this library's; then hand the memory over."""
        array, allocation = self.array, self.array.allocation
        if not self._caller.wait(allocation.written):
            self._tell(stream, allocation)
        return capsule(
            array.address, array.shape, array.strides, array.dtype, self._gpu.ordinal, array
        )

    def _tell(self, stream: int | None, allocation: Allocation) -> None:
        """Let the stream of a library that shows none wait for `allocation`."""
        if stream is None or stream == -1:  # any stream may read it next
            for event in events(allocation.written):
                event.sync()
            stream = LEGACY_STREAM
        consumer = Queue(self._gpu, self._gpu.adopt(stream))
        consumer.wait(allocation.written)
        if not self._caller.readers:
            allocation.consumers.append(consumer)
