"""A terminal without a window: a pty, and an emulator that says what a person would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
from collections.abc import Callable
from typing import Any

import pyte


class Screen:
    """A terminal of some `columns`; programs write to `slave`."""

    def __init__(self, columns: int = 80, rows: int = 50) -> None:
        self.master, self.slave = pty.openpty()
        self._emulator = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._emulator)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int = 50) -> None:
        """Give the window another size."""
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)
        self._emulator.resize(rows, columns)

    @property
    def lines(self) -> list[str]:
        """What is to be seen now, without the empty rows at the end."""
        while select.select([self.master], [], [], 0)[0]:
            self._stream.feed(os.read(self.master, 1 << 16))
        return "\n".join(line.rstrip() for line in self._emulator.display).rstrip().splitlines()

    @property
    def popen(self) -> dict[str, Any]:
        """Options of a process that runs in the foreground of this terminal."""
        return {"stdout": self.slave, "stderr": self.slave, "preexec_fn": self._control()}

    def _control(self) -> Callable[[], object]:
        return lambda: fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def type(self, keys: bytes) -> None:
        """Press some keys; Ctrl-C is ``\\x03``."""
        os.write(self.master, keys)

    def close(self) -> None:
        """Close the window."""
        os.close(self.master)
        os.close(self.slave)
