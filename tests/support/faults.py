"""How soon and how rightly a job ends when a rank is lost: ``python -m tests.support.faults``.

Every deadly kind of ``--chaos`` strikes the real job in every phase, at a random item and rank.
Each line says how many were named rightly (rank, phase and item), how many left nothing behind, and
how long it took from the fault, or from the deadline, to the end of mpirun: median and longest.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from mdattn_mpi.cli import main as mdattn
from mdattn_mpi.lockstep import death_note
from mdattn_mpi.lockstep.chaos import DEADLY
from tests.support.mpirun import kill_all, mark_of, orphans, start

PHASES = ("read", "agree", "begin", "enqueue", "write")
DEADLINED = ("hold-gil", "sleep", "stop")
ITEMS = 4


class Outcome(NamedTuple):
    """What became of one fault."""

    named: bool
    alone: bool  # no process stayed behind
    seconds: float  # from the fault or the deadline to the end of mpirun


def strike(data: Path, out: Path, ranks: int, deadline: float, spec: str) -> Outcome:
    """Run the job with one fault."""
    command = ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), "-b", "cpu", "--threads", "1"]
    options = ["--deadline", str(deadline), "--overwrite", "--chaos", spec]
    shutil.rmtree(f"{out}.run", ignore_errors=True)
    process = start(ranks, [*command, *options])
    try:
        _, said = process.communicate(timeout=120)
        ended = time.time()
        left = orphans(mark_of(process))
    finally:
        kill_all(mark_of(process))
    note = death_note.read(f"{out}.run")
    kind, _, where = spec.partition("@")
    phase, item, rank = where.split(":")
    if note is None or not process.returncode:
        print(f"{spec}: exit {process.returncode}, no note\n{said}", file=sys.stderr)
        return Outcome(False, not left, float("nan"))
    named = (note["phase"], note["item"], note["rank"]) == (phase, item, int(rank))
    if not named:
        print(f"{spec}: {death_note.message(note)}\n{said}", file=sys.stderr)
    struck = note["time"] - note["seconds"]
    return Outcome(named, not left, ended - struck - (deadline if kind in DEADLINED else 0.0))


def line(name: str, outcomes: Sequence[Outcome]) -> str:
    """One row of the table."""
    times = [outcome.seconds for outcome in outcomes]
    return (
        f"{name:14} {sum(o.named for o in outcomes)} of {len(outcomes)} named, "
        f"{sum(o.alone for o in outcomes)} left nothing, "
        f"{median(times):.2f} s, at most {max(times):.2f} s"
    )


def main() -> int:
    """Strike; print a line a phase and a line a kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind in each phase")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    by_phase: dict[str, list[Outcome]] = {}
    by_kind: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory(prefix="mdattn-faults-") as name:
        data = Path(name) / "data.h5"
        options = "--length 400 --q-heads 2 --head-dim 32 --seed 1"
        assert not mdattn(["make-data", str(data), "--items", str(ITEMS), *options.split()])
        for _ in range(arguments.rounds):
            for phase in PHASES:
                for kind in DEADLY:
                    item, rank = draw.randrange(ITEMS), draw.randrange(arguments.ranks)
                    spec = f"{kind}@{phase}:item{item}:{rank}"
                    outcome = strike(
                        data, Path(name) / "out.h5", arguments.ranks, arguments.deadline, spec
                    )
                    by_phase.setdefault(phase, []).append(outcome)
                    by_kind.setdefault(kind, []).append(outcome)
    for name, outcomes in (*by_phase.items(), *by_kind.items()):
        print(line(name, outcomes))
    return 0 if all(o.named and o.alone for each in by_phase.values() for o in each) else 1


if __name__ == "__main__":
    sys.exit(main())
