"""Start and end of the ranks, groups, agreement, barriers and the watchdog.

`watch` must run before MPI, NumPy or a thread exist, so what needs MPI is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mdattn_mpi.lockstep.board import Board, board
from mdattn_mpi.lockstep.deadlines import Deadlines, TimeLimit
from mdattn_mpi.lockstep.launcher import Launcher, launcher
from mdattn_mpi.lockstep.terminal import Terminal, terminal
from mdattn_mpi.lockstep.watchdog import watch

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.agreement import Agreement, Step
    from mdattn_mpi.lockstep.group import Group, gather_together, together
    from mdattn_mpi.lockstep.world import World, start

__all__ = [
    "Agreement",
    "Board",
    "Deadlines",
    "Group",
    "Launcher",
    "Step",
    "Terminal",
    "TimeLimit",
    "World",
    "board",
    "gather_together",
    "launcher",
    "start",
    "terminal",
    "together",
    "watch",
]

_NEED_MPI = {
    "Agreement": "agreement",
    "Step": "agreement",
    "Group": "group",
    "gather_together": "group",
    "World": "world",
    "start": "world",
    "together": "group",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_MPI:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_NEED_MPI[name]}"), name)
    globals()[name] = found  # the next time it isn't asked for here
    return found
