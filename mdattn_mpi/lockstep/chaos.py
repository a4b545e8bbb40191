"""Faults on purpose: ``--chaos KIND@PHASE[:ITEM[:RANK]]`` or ``--chaos seed=N``.

The fault strikes when the rank enters the phase. Without an item it strikes at the first one,
without a rank on rank 0. ``agree`` means any agreement. ITEM is an item's name or, as ``#3``, the
third item that reaches the phase on this rank, from 0. ``slow`` takes half a second, every time. A
seed draws the kind, the rank and the moment (the n-th phase that the rank enters).
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.launcher import Launcher, launcher

_FOREVER = 10**8
_MOMENTS = 60  # phases that a small job has at least


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _segfault() -> None:
    ctypes.string_at(0)


def _exit_0() -> None:
    raise SystemExit(0)


def _exit_3() -> None:
    os._exit(3)


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


def _sleep() -> None:
    time.sleep(_FOREVER)


def _slow() -> None:
    time.sleep(0.5)


KINDS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "stop": _stop,
    "segfault": _segfault,
    "exit0": _exit_0,
    "exit3": _exit_3,
    "raise": _raise,
    "raise-thread": _raise_in_thread,
    "hold-gil": _hold_gil,
    "sleep": _sleep,
    "slow": _slow,
}
DEADLY = sorted(set(KINDS) - {"slow"})


@dataclass
class Chaos:
    """One fault that waits for its moment."""

    kind: str
    phase: str = ""  # any
    item: str = ""  # any
    moment: int = 0  # how many times to let it pass
    _items: list[str] = field(default_factory=list)

    def enter(self, phase: str, item: str) -> None:
        """Strike if this is the phase, the item and the moment."""
        if self.phase and self.phase != phase.partition(" ")[0]:
            return
        if self.item.startswith("#"):
            if item not in self._items:
                self._items.append(item)
            if self._items.index(item) != int(self.item[1:]):
                return
        elif self.item and self.item != item:
            return
        self.moment -= 1
        if self.moment < 0:
            KINDS[self.kind]()


def arm(spec: str, board: Board, launched: Launcher | None = None) -> None:
    """Let the fault that `spec` names happen in this process, if it is the one.

    Raises
    ------
    RejectedError
        `spec` can't be read.

    """
    launched = launched or launcher()
    rank, chaos = parse(spec, launched.size)
    if rank == launched.rank:
        board.on_enter = chaos.enter


def parse(spec: str, size: int) -> tuple[int, Chaos]:
    """Read a specification; return the rank that it is for and the fault.

    Raises
    ------
    RejectedError
        `spec` can't be read.

    """
    if spec.startswith("seed=") and spec[5:].isdecimal():
        draw = random.Random(int(spec[5:]))
        rank, moment = draw.randrange(size), draw.randrange(_MOMENTS)
        return rank, Chaos(draw.choice(DEADLY), moment=moment)
    kind, _, where = spec.partition("@")
    phase, _, rest = where.partition(":")
    item, _, rank_text = rest.rpartition(":") if rest.count(":") else (rest, "", "0")
    index_is_bad = item.startswith("#") and not item[1:].isdecimal()
    if kind not in KINDS or not phase or not rank_text.isdecimal() or index_is_bad:
        raise RejectedError(
            f"--chaos {spec!r} is no fault",
            fix=f"write KIND@PHASE[:ITEM[:RANK]] with one of {', '.join(KINDS)}, or seed=N",
        )
    return int(rank_text), Chaos(kind, phase, item)
