"""Saying what a job is waiting for, whatever takes longer than two seconds before its first item
and after its last: the items themselves have a progress bar.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mdattn_mpi.lockstep import World
from mdattn_mpi.runner.job import tell
from mdattn_mpi.runner.jobspec import JobSpec

PATIENCE = 2.0  # seconds
LOOK = 0.2
WORDS = {
    "run folder": "another job that writes this output to end",
    "sources": "the model's files to be looked at",
    "dataset": "the dataset to be scanned",
    "output": "the output to be made",
    "open output": "the output to be opened",
    "prepare": "kernels or engines to be made ready",
    "build engine": "an engine to be built",
    "load engine": "an engine to be loaded",
    "end": "the other ranks to leave",
}
OF_ITEMS = {"read", "begin", "enqueue", "collect", "write", "agree", "claim", "groups"}


@contextmanager
def announced_waits(spec: JobSpec, world: World) -> Iterator[None]:
    """As long as the block lasts, say on rank 0 in which phase it has been for `PATIENCE`."""
    if world.rank or spec.quiet:
        yield
        return
    over, page = threading.Event(), world.board.page

    def look() -> None:
        announced = 0
        while not over.wait(LOOK):
            number, phase = page.phases, page.phase.decode(errors="replace")
            late = time.monotonic() - page.since > PATIENCE
            if late and number != announced and phase not in OF_ITEMS:
                announced = number
                tell(f"mdattn: waiting for {WORDS.get(phase, phase)}")

    thread = threading.Thread(target=look, name="mdattn-waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
