"""A job of nothing but lockstep: ``python -m tests.support.small_job FOLDER [options]``.

It walks through the phases of the real loop without files or attention, and keeps in FOLDER/done
which items were finished, one line each, so that a resumed run skips them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mdattn_mpi.lockstep import board, watch
from mdattn_mpi.lockstep.chaos import arm

PHASES = ("start", "open", "read", "agree", "begin", "enqueue", "collect", "write", "commit", "end")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=60.0)
    parser.add_argument("--step", type=float, default=0.0)
    parser.add_argument("--chaos", default="")
    arguments = parser.parse_args()
    return watch(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> int:
    board().patience = arguments.deadline
    if arguments.chaos:
        arm(arguments.chaos, board())
    from mdattn_mpi.lockstep import Step, start

    world = start()
    world.board.enter("open")
    done = arguments.folder / "done"
    if world.rank == 0:
        done.touch()
    world.agree(Step(-1, "open", 0))
    world.board.identify(device="toy")
    world.board.attach(arguments.folder, world.rank, world.size)
    finished = len(done.read_text().splitlines())
    world.board.progress(finished, arguments.items)
    for item in range(finished, arguments.items):
        name = f"item-{item}"
        world.board.enter("read", name)
        world.board.enter("agree", name)
        if world.agree(Step(item, "begin", 7), stop=board().stop_requested).stop:
            print(f"rank {world.rank} stops before {name}", file=sys.stderr)
            return 75
        for phase in ("begin", "enqueue", "collect"):
            world.board.enter(phase, name)
            if phase == "enqueue":
                time.sleep(arguments.step)
                with world.board.waiting():  # stands for an exchange
                    world.control.Barrier()
        world.board.enter("write", name)
        world.board.enter("agree", name)
        world.agree(Step(item, "write", 7), word=world.rank)
        world.board.enter("commit", name)
        if world.rank == 0:
            with done.open("a") as stream:
                stream.write(f"{name}\n")
        world.board.progress(item + 1, arguments.items)
    world.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
