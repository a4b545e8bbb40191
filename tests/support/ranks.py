"""Tests whose body runs on every rank of a real mpirun: `on_ranks`.

The bodies of one file share one mpirun for each number of ranks: starting MPI and importing takes
longer than most of them. ``python -m tests.support.ranks FILE FOLDER NAME …`` is one of its ranks.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.support.mpirun import mpirun


def on_ranks(*counts: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the decorated test on every rank of a real mpirun, once for each of `counts`.

    The test takes the world, and an empty folder if it names a second argument. What any rank
    raises is printed with its rank and fails the test. ``@on_ranks()`` means 1, 2, 3 and 4.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        file, name = inspect.getfile(body), body.__qualname__

        @pytest.mark.parametrize("ranks", counts or (1, 2, 3, 4))
        def test(ranks: int, request: pytest.FixtureRequest) -> None:
            failed = outcomes(file, ranks, request.session)[name]
            assert not failed, failed

        test.__doc__ = body.__doc__
        test.body = body  # type: ignore[attr-defined]
        return test

    return decorate


@cache
def outcomes(file: str, ranks: int, session: pytest.Session) -> dict[str, str]:
    """How the bodies of `file` that were selected fared on `ranks` ranks; "" if well."""
    names = [
        item.originalname
        for item in session.items
        if isinstance(item, pytest.Function)
        and str(item.path) == file
        and hasattr(item.obj, "body")
        and item.callspec.params["ranks"] == ranks
    ]
    factory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    folder = factory.mktemp(f"{Path(file).stem}-{ranks}")
    found: dict[str, str] = {}
    while left := [name for name in names if name not in found]:
        found.update(run_some(file, ranks, folder, left))
    return found


def run_some(file: str, ranks: int, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Run bodies up to the first that fails."""
    try:
        run = mpirun(ranks, ["-m", "tests.support.ranks", file, str(folder), *names])
        said, code = f"exit {run.returncode}\n{run.stdout}\n{run.stderr}", run.returncode
    except pytest.fail.Exception as failure:
        said, code = str(failure), 1
    well = [name for name in names if (folder / f"{name}.ended").exists()]
    if not code and well == names:
        return dict.fromkeys(well, "")
    return {**dict.fromkeys(well, ""), names[min(len(well), len(names) - 1)]: said}


def main() -> None:
    """Call the bodies one after the other with the world (and a folder)."""
    file, folder, *names = sys.argv[1:]
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    from mdattn_mpi.lockstep.world import start  # not by the tests: it mustn't start MPI there

    world = start()
    try:
        for name in names:
            body, own = getattr(module, name).body, Path(folder, name)
            own.mkdir(exist_ok=True)
            world.barrier()
            body(*(world, own)[: len(inspect.signature(body).parameters)])
            world.barrier()
            if world.rank == 0:
                Path(folder, f"{name}.ended").touch()
    except BaseException:
        text = "".join(
            f"[rank {world.rank}] {line}" for line in traceback.format_exc().splitlines(True)
        )
        print(text, file=sys.stderr, flush=True)
        time.sleep(1.0)  # let the other ranks say what they think before mpirun kills them
        os._exit(1)
    world.end()


if __name__ == "__main__":
    main()
