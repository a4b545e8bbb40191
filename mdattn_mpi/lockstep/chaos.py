"""Faults on purpose: ``--chaos KIND@PHASE[:ITEM[:RANK]]``.

The rank fails when it enters the phase: at the first item if none is named, and on rank 0 if no
rank is. ``agree`` means any agreement. ITEM is an item's name or, as
``#3``, the third item that reaches the phase on this rank, from 0. ``slow`` takes half a second,
every time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.launcher import Launcher, launcher

_FOREVER = 10**8


def _exit_0() -> None:
    raise SystemExit(0)


def _raise() -> None:
    raise RuntimeError("chaos")


def _raise_in_thread() -> None:
    thread = threading.Thread(target=_raise, name="chaos")
    thread.start()
    thread.join()


def _hold_gil() -> None:
    """Wait for a lock that this thread holds already; no signal interrupts that."""
    mutex = ctypes.create_string_buffer(256)  # zeros are an open pthread_mutex_t
    library = ctypes.PyDLL(None)  # unlike CDLL, PyDLL keeps the GIL
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


KINDS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: print(ctypes.string_at(0)),
    "exit0": _exit_0,
    "exit3": lambda: os._exit(3),
    "raise": _raise,
    "raise-thread": _raise_in_thread,
    "hold-gil": _hold_gil,
    "sleep": lambda: time.sleep(_FOREVER),
    "slow": lambda: time.sleep(0.5),
}
DEADLY = sorted(set(KINDS) - {"slow"})


@dataclass
class Chaos:
    """One fault, and where it happens."""

    kind: str
    phase: str
    item: str  # "" for any
    _items: list[str] = field(default_factory=list)

    def enter(self, phase: str, item: str) -> None:
        """Fail if this is the phase and the item."""
        if self.phase != phase.partition(" ")[0]:
            return
        if self.item.startswith("#"):
            if item not in self._items:
                self._items.append(item)
            if self._items.index(item) != int(self.item[1:]):
                return
        elif self.item and self.item != item:
            return
        KINDS[self.kind]()


def arm(spec: str, board: Board, launched: Launcher | None = None) -> None:
    """Have this process fail as `spec` says, if it names this rank.

    Raises
    ------
    RejectedError
        `spec` can't be read.

    """
    launched = launched or launcher()
    rank, chaos = parse(spec)
    if rank == launched.rank:
        board.on_enter = chaos.enter


def parse(spec: str) -> tuple[int, Chaos]:
    """Read a specification; return the rank that it is for and the fault.

    Raises
    ------
    RejectedError
        `spec` can't be read.

    """
    kind, _, where = spec.partition("@")
    phase, _, rest = where.partition(":")
    item, _, rank_text = rest.rpartition(":") if rest.count(":") else (rest, "", "0")
    index_is_bad = item.startswith("#") and not item[1:].isdecimal()
    if kind not in KINDS or not phase or not rank_text.isdecimal() or index_is_bad:
        raise RejectedError(
            f"--chaos {spec!r} names no fault",
            fix=f"write KIND@PHASE[:ITEM[:RANK]] with one of {', '.join(KINDS)}",
        )
    return int(rank_text), Chaos(kind, phase, item)
