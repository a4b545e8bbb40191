"""The terminal at which a job was started, and one line at its bottom that changes.

Launchers give their ranks pipes, and Open MPI's passes on what comes through them in whole lines
(seen with 5.0.11): a line that is drawn again and again would arrive when it is over. So it is
drawn where the launcher's standard error leads to, by those on its node. All other text goes the
launcher's way, and may come from any rank, at any time. The cursor therefore rests two rows above
the line, where there is room for it until the line is drawn again.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from mdattn_mpi.lockstep.launcher import launcher, launcher_process
from mdattn_mpi.lockstep.process import Process

_ERASE = "\r\x1b[J"  # from the row of the cursor to the end of the screen; ECMA-48, ED
_DOWN, _UP = "\n\n", "\r\x1b[2A"


@dataclass(frozen=True)
class Terminal:
    """A terminal, as `holder` has it for its standard error. Nothing here waits for it."""

    fd: int
    holder: Process

    @property
    def columns(self) -> int:
        """Its width now; 80 where it doesn't say."""
        with suppress(OSError):
            return os.get_terminal_size(self.fd).columns or 80
        return 80

    @property
    def is_ours(self) -> bool:
        """Whether `holder` is still there, and not in the background of a shell."""
        now = Process.look(self.holder.pid)
        return bool(now and now.start == self.holder.start and now.is_alive and now.in_foreground)

    def draw(self, line: str) -> None:
        """Show `line`, which must be narrower than the terminal, in place of the one before."""
        self._write(f"{_ERASE}{_DOWN}{line}{_UP}")

    def erase(self) -> None:
        """Take the line away; the cursor is where the next text belongs."""
        self._write(_ERASE)

    def say(self, text: str) -> None:
        """Write `text` below all other, where the launcher may pass on nothing any more."""
        self._write(f"{_ERASE}{text}\n")

    def _write(self, text: str) -> None:
        if self.is_ours:
            with suppress(OSError):  # it has been stopped by Ctrl-S, or was closed
                os.write(self.fd, text.encode(sys.stderr.encoding or "utf-8", errors="replace"))


def terminal(environment: Mapping[str, str] = os.environ) -> Terminal | None:
    """Find the terminal that this process's standard error leads to, by itself or by the launcher.

    None where there is none, where it can't move its cursor, and where the launcher is on another
    node.
    """
    if environment.get("TERM", "dumb") == "dumb":
        return None
    with suppress(OSError):
        kind = os.fstat(2).st_mode
        if os.isatty(2):
            return _open(Process.look(os.getpid()))
        if launcher(environment).name == "mpirun" and (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            return _open(launcher_process())
    return None


def _open(holder: Process | None) -> Terminal | None:
    """Open it anew: not to wait for it is then our own affair, and not that of all who have it."""
    if holder is None:
        return None
    path = f"/proc/{holder.pid}/fd/2"
    if not stat.S_ISCHR(os.stat(path).st_mode):
        return None
    fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    if os.isatty(fd):
        return Terminal(fd, holder)
    os.close(fd)
    return None
