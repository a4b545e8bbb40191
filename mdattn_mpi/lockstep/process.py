"""What Linux knows about a process, and does for one; nothing on other systems."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

WATCHDOG = "mdattn-watchdog"  # its name for ps and top
_PR_SET_PDEATHSIG = 1


class Process(NamedTuple):
    """A process; `start` tells it from a later one of the same pid."""

    pid: int
    name: str
    state: str
    parent: int
    start: int
    group: int = 0
    foreground: int = -1  # the group that its terminal listens to; -1 without a terminal

    @property
    def in_foreground(self) -> bool:
        """Whether it isn't in the background of a shell."""
        return self.foreground in (self.group, -1)

    @property
    def is_alive(self) -> bool:
        """Whether it is more than a zombie."""
        return self.state not in "ZX"

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.start / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def look(pid: int) -> Process | None:
        """Read it; None if there is none."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        # The name stands in brackets and may itself hold some.
        name, _, rest = text.partition("(")[2].rpartition(")")
        fields = rest.split()
        parent, group, foreground, start = (int(fields[number]) for number in (1, 2, 5, 19))
        return Process(pid, name, fields[0], parent, start, group, foreground)


def process_state(pid: int) -> str:
    """Return the kernel's letter for the state of a process; "" if there is no such process."""
    found = Process.look(pid)
    return found.state if found else ""


class StateFile:
    """The kernel's letter for the state of one process, for who asks again and again.

    Its file is opened once: it stays that of this process, whoever gets its number later.
    """

    def __init__(self, pid: int) -> None:
        self._fd = -1
        with suppress(OSError):
            self._fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> str:
        """Return the letter; "" once there is no such process."""
        try:
            # The letter stands after the name, in brackets, which may itself hold some.
            return os.pread(self._fd, 4096, 0).rpartition(b")")[2].split()[0].decode()
        except (OSError, IndexError):
            return ""

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def name_this(name: str) -> None:
    """Name this process for ``ps`` and ``top``."""
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def set_death_signal(number: int) -> None:
    """Have the kernel send a signal to this process when its parent dies."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
