"""Count the files that Python opens: ``python -m tests.support.opened COUNTS PROGRAM [arguments]``.

PROGRAM is ``mdattn`` or ``bare``: an MPI program that imports mpi4py, NumPy and h5py and meets the
others once. A rank and its watchdog count together, from before the fork, and add a line to COUNTS.
A module counts once, whether its compiled form was found or not, and what a shared library opens
doesn't count: so the figure is that of the program, not of the machine.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

seen: set[str] = set()
page = mmap.mmap(-1, 8)  # shared with the processes that this one forks


def count(event: str, arguments: tuple[Any, ...]) -> None:
    """Take note of a file that is opened for the first time by this process."""
    if event != "open" or not isinstance(arguments[0], str) or arguments[0].startswith("/proc"):
        return
    path = arguments[0].replace("__pycache__/", "")
    if path.endswith(".pyc"):
        path = path.split(".cpython-")[0] + ".py"
    if path not in seen:
        seen.add(path)
        now = int.from_bytes(page[:], "little") + 1
        page[:] = now.to_bytes(8, "little")


def bare() -> int:
    """Do what every MPI program does."""
    import h5py
    import numpy as np
    from mpi4py import MPI

    assert h5py
    assert np
    MPI.COMM_WORLD.Barrier()
    return 0


def main() -> int:
    """Run the program; note what its first process, and those forked by it, have opened."""
    counts, program, *arguments = sys.argv[1:]
    started_by = os.getpid()
    sys.addaudithook(count)
    sys.argv = ["mdattn", *arguments]
    try:
        if program == "bare":
            return bare()
        from mdattn_mpi.cli import main as mdattn

        return mdattn(arguments)
    finally:
        if os.getpid() == started_by:
            line = f"{program} {int.from_bytes(page[:], 'little')}\n"
            with open(counts, "a") as file:
                file.write(line)


if __name__ == "__main__":
    sys.exit(main())
