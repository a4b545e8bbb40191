"""One rank of a test: ``python -m tests.support.ranks FILE::FUNCTION FOLDER``, under mpirun."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import time
import traceback
from pathlib import Path

from mdattn_mpi.lockstep.world import start


def main() -> None:
    """Call the body of an `on_ranks` test with the world (and the folder)."""
    file, _, name = sys.argv[1].partition("::")
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    body = getattr(module, name).body
    world = start()
    try:
        arguments = (world, Path(sys.argv[2]))[: len(inspect.signature(body).parameters)]
        body(*arguments)
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
