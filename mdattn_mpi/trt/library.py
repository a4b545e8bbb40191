"""TensorRT, whichever there is: flavour, version, and what it can do on a GPU, as data.

Two packages carry the same Python API: ``tensorrt`` (11 and later; any data-centre GPU) and
``tensorrt_rtx`` (a complete wheel for workstation GPUs). This module alone imports either.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

from mdattn_mpi.devices.presence import gpu_count, gpu_sm
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.text import install
from mdattn_mpi.trt.versions import Flavour, recognize

SM = tuple[int, int]

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
INSTALL = (
    f"{install('tensorrt')} (any GPU since SM 8.0; fetches TensorRT from NVIDIA's index) or "
    f"{install('tensorrt-rtx')} (SM 8.0, 8.6, 8.9 and 12.x; a complete wheel)"
)
LOGGER = logging.getLogger("mdattn_mpi.tensorrt")
LOGGER.addHandler(logging.NullHandler())  # who wants its words asks for them; errors carry theirs

# Where full TensorRT has what: "GPU Architecture and Precision Support" and "Multi-Device
# Inference" of its documentation, 11.x.
COLLECTIVES_SINCE: SM = (8, 0)
RING_SINCE: SM = (10, 0)


class Capabilities(NamedTuple):
    """The strategies of more than one rank that a library runs on one SM; why not the others."""

    strategies: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class Library:
    """One TensorRT package."""

    flavour: Flavour
    version: str
    api: Any

    @cached_property
    def targets(self) -> tuple[SM, ...]:
        """The SMs for which it builds without having such a GPU; full TensorRT: none."""
        names = getattr(self.api, "ComputeCapability", None)
        if self.flavour == "tensorrt" or names is None:
            return ()
        numbers = [name[2:] for name in vars(names) if name.startswith("SM")]
        return tuple(sorted((int(number[:-1]), int(number[-1])) for number in numbers))

    def capabilities(self, sm: SM) -> Capabilities:
        """Tell what runs on GPUs of `sm`."""
        names = ("allgather", "ulysses")
        if self.flavour == "tensorrt":
            if sm < COLLECTIVES_SINCE:
                return Capabilities((), "TensorRT's collectives need SM 8.0 or later")
            if sm < RING_SINCE:
                return Capabilities(names, "multi-device attention needs SM 10.0 or later")
            return Capabilities(("ring", *names))
        if sm < COLLECTIVES_SINCE or sm not in self.targets:
            known = ", ".join(show_sm(target) for target in self.targets if target >= (8, 0))
            return Capabilities((), f"TensorRT-RTX runs on SM {known} only")
        return Capabilities(names, "TensorRT-RTX has no multi-device attention")

    def __str__(self) -> str:
        """For example ``tensorrt_rtx 1.7.1.116``."""
        return f"{self.flavour} {self.version}"


def show_sm(sm: SM) -> str:
    """Write compute capability ``(9, 0)`` as ``9.0``."""
    return f"{sm[0]}.{sm[1]}"


def visible_sm() -> SM | None:
    """Compute capability of the first GPU that this process sees; None without one."""
    return gpu_sm(0) if gpu_count() > 0 else None


def parse_sm(text: str) -> SM:
    """Read ``9.0``, ``90`` or ``sm_90``; refuse anything else."""
    digits = text.lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isdecimal() or not 2 <= len(digits) <= 3:
        raise RejectedError(f"{text!r} is no compute capability", fix="write it like 8.9 or 12.0")
    return int(digits[:-1]), int(digits[-1])


def find_library(flavours: Sequence[Flavour] = FLAVOURS) -> Library:
    """Import the first of `flavours` that is installed and has the multi-device API.

    Raises
    ------
    RejectedError
        None is there, or too old; both packages are named, with what each needs.

    """
    tried: list[str] = []
    for flavour in flavours:
        try:
            api = import_module(flavour)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == flavour
            tried.append(f"{flavour} is not installed" if missing else f"{flavour}: {error}")
            continue
        version = str(api.__version__)
        if hasattr(api.INetworkDefinition, "add_dist_collective"):
            return Library(flavour, version, api)
        tried.append(f"{flavour} {version} has no multi-device layers")
    raise RejectedError(f"no TensorRT that can be used: {'; '.join(tried)}", fix=INSTALL)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's garbage collector out of TensorRT; a decorator too.

    TensorRT calls its logger, which is Python, with a lock held. If the collector ran in there and
    found one of TensorRT's objects in a cycle, its destructor would wait for that lock for ever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Log:
    """TensorRT's words: into Python logging, and the last of them for an error."""

    def __init__(self, library: Library, keep: int = 8) -> None:
        self._library = library
        self._kept: deque[tuple[int, str]] = deque(maxlen=keep)
        self.sink = _sink(library.api, self._take)

    def _take(self, level: int, text: str) -> None:
        LOGGER.log(level, "%s", text)
        if level >= logging.WARNING:
            self._kept.append((level, text))

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    def last_words(self) -> str:
        """Join the kept errors, or the kept warnings where there is no error."""
        worst = max((level for level, _ in self._kept), default=0)
        words = [text for level, text in self._kept if level == worst]
        return " | ".join(dict.fromkeys(words)) or "TensorRT gave no reason"

    @property
    def complains(self) -> bool:
        """Whether an error was logged: TensorRT may go on, and return what looks like success."""
        return any(level >= logging.ERROR for level, _ in self._kept)

    def error(self, what: str, fix: str = "") -> DeviceError:
        """Make an error with TensorRT's words inside, explained where they are known."""
        words = self.last_words()
        fault = recognize(words, self._library.flavour, self._library.version)
        if fault is None:
            return DeviceError(f"{what}: {words}", fix=fix)
        return DeviceError(f"{what}: {words}. {self._library} may have {fault}", fix=fault.fix)


def _sink(api: Any, take: Callable[[int, str], None]) -> Any:
    """Derive from TensorRT's ILogger, which exists only once the library is imported."""
    severity = api.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.CRITICAL,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    class Sink(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if level in (severity.INFO, severity.VERBOSE) and not verbose:
                return
            take(levels[level], text)

    verbose = LOGGER.isEnabledFor(logging.DEBUG)
    return Sink()


def check_one_nccl(found: Sequence[str]) -> None:
    """Refuse a process in which TensorRT and nccl4py would talk to different libraries.

    A communicator of one NCCL means nothing to another.
    """
    if len(found) == 1:
        return
    what = (
        f"{len(found)} NCCL libraries are loaded: {', '.join(found)}"
        if found
        else "no NCCL library is loaded"
    )
    raise DeviceError(
        what,
        fix="let nccl4py and TensorRT find the same libnccl.so.2: remove one of the two, or put "
        "the folder of the other first in LD_LIBRARY_PATH",
    )
