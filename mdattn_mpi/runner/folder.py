"""The run folder: logs, summary, death note, and the board on which watchdogs meet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdattn_mpi.errors import MdattnError
from mdattn_mpi.lockstep import World, together
from mdattn_mpi.runner.job import run_folder
from mdattn_mpi.runner.jobspec import JobSpec


@contextmanager
def watched_folder(spec: JobSpec, world: World) -> Iterator[None]:
    """Collective. Have the run folder before anything slow begins: engines take minutes to build.

    A job that is refused before it has an output leaves no folder behind. Without a place for it
    (or for a dry run) there is none; what comes later says what is wrong with the place.
    """
    folder = run_folder(spec)

    def make() -> bool:
        with suppress(OSError):
            folder.mkdir()
            return True
        return False

    made = not spec.dry_run and together(
        world, "run folder", lambda: make() if world.rank == 0 else False
    )
    if not spec.dry_run and folder.is_dir():
        world.board.attach(folder, world.rank, world.size)
    try:
        yield
    except MdattnError as error:
        if error.agreed:
            _leave_no_trace(spec, world, made)
        raise


def _leave_no_trace(spec: JobSpec, world: World, made: bool) -> None:
    """Collective. Remove a folder that was made for nothing."""
    forsaken = not Path(spec.output).exists()
    if forsaken:
        world.board.detach()
    world.barrier()
    if made and forsaken:
        shutil.rmtree(run_folder(spec), ignore_errors=True)
