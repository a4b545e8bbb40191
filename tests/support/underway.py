"""A job in the middle of its work, seen from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mdattn_mpi.cli import main
from mdattn_mpi.lockstep.board import BoardFile
from mdattn_mpi.lockstep.record import Record
from mdattn_mpi.runner.loop import MOST_BEHIND
from tests.support.mpirun import kill_all, mark_of, mpirun, start

# No more items than that are on their way to the disk: when a job stands still at this one, an
# item is done or will be, however slow the disk is.
STANDS = MOST_BEHIND + 4

T = TypeVar("T")


def until(seen: Callable[[], T], patience: float = 60.0) -> T:
    """Wait for something true, and return it."""
    end = time.monotonic() + patience
    while not (found := seen()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


class StandingJob:
    """A job of two ranks and `items` items that take no time, which stands still at `STANDS`."""

    def __init__(self, folder: Path, items: int = 24) -> None:
        self.data, self.out = folder / "data.h5", folder / "out.h5"
        shape = ["--length", "50", "--head-dim", "16"]
        assert main(["make-data", str(self.data), "--items", str(items), *shape]) == 0
        self.command = ["-m", "mdattn_mpi", "run", str(self.data), "-o", str(self.out), "-b", "cpu"]
        self.process = start(2, [*self.command, "--chaos", f"sleep@enqueue:item{STANDS}:1"])

    def kill_rank(self, rank: int) -> None:
        """Kill it as the kernel would, and wait for the end of the job."""
        os.kill(BoardFile(f"{self.out}.run").records()[rank].pid, signal.SIGKILL)
        self.process.communicate(timeout=60)

    def finish(self) -> None:
        """Run it again, to its end."""
        mpirun(2, self.command, check=True)

    def __enter__(self) -> StandingJob:
        return self

    def __exit__(self, *_: object) -> None:
        kill_all(mark_of(self.process))


def until_an_item_is_done(out: Path, ranks: int = 2) -> list[Record]:
    """Wait for a job to be in its middle; return the pages of all ranks.

    The page of the first may be there alone: a node publishes those that its ranks have by then.
    """
    board = BoardFile(f"{out}.run")

    def pages() -> list[Record]:
        records = board.records()
        whole = len(records) == ranks and any(record.done for record in records)
        return records if whole else []

    until(lambda: Path(board.folder).exists())
    return until(pages)
