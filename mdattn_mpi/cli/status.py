"""Say how the job that writes an output is doing, while it runs or after: items done and left,
rate, time to go, what each rank is doing and since when, and the death note if a rank was lost.
Of several outputs, or of a folder of them, a line each. Reads files only; the job doesn't notice.
Ages compare the clocks of two hosts.

  mdattn status out.h5
  mdattn status results/ --watch
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdattn_mpi.errors import RejectedError, name_ranks
from mdattn_mpi.text import counted, duration, printable, show, wrapped

if TYPE_CHECKING:
    from mdattn_mpi.runner.status import Facts
    from mdattn_mpi.slurm import SlurmJob

EPILOG = "Exit codes: 0 answered; 2 no such output, and no job that is going to write it."

WATCH = 2.0  # seconds between two looks
ASK_SLURM = 30.0  # seconds between two questions to Slurm's controller, which has others to answer
MOST_RANKS = 8  # that get a line each
MOST_FAILED = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "outputs", nargs="+", metavar="OUT.h5", help="what the job writes; or a folder of such"
    )
    parser.add_argument(
        "--watch", action="store_true", help="look again and again, until nothing goes on any more"
    )
    parser.add_argument(
        "--every", type=float, default=WATCH, metavar="SECONDS", help="how often (%(default)g)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON: an object, or an array of several"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print how the job is doing."""
    if arguments.watch:
        return watch(arguments)
    found = look(arguments.outputs)
    if not arguments.json:
        show("\n".join(lines_of(found)))
    else:
        several = len(arguments.outputs) > 1 or Path(arguments.outputs[0]).is_dir()
        show(json.dumps(found if several else found[0], indent=1))
    return exit_code(found)


def watch(arguments: argparse.Namespace) -> int:
    """Print it again and again: in place on a terminal, else a line an output when it changed."""
    from mdattn_mpi.runner.status import GOING_ON

    jobs, before = SlurmJobs(), ""
    in_place = InPlace() if sys.stdout.isatty() and not arguments.json else None
    try:
        while True:
            found = look(arguments.outputs, jobs)
            text = "\n".join(map(json.dumps if arguments.json else brief, found))
            if in_place:
                in_place.show(list(lines_of(found)))
            elif text != before:
                show(text)
            before = text
            if not any(facts["state"] in GOING_ON for facts in found):
                return exit_code(found)
            time.sleep(max(0.1, arguments.every))
    except KeyboardInterrupt:  # who has seen enough
        return 0


class InPlace:
    """Lines on a terminal that replace those before."""

    def __init__(self) -> None:
        self._height = 0

    def show(self, lines: Sequence[str]) -> None:
        """Print as much as has room, so that none of it scrolls away."""
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        lines = [line[: columns - 1] for line in lines[: rows - 1]]
        up = f"\x1b[{self._height}A" if self._height else ""
        show(f"{up}\r\x1b[J" + "\n".join(lines))
        self._height = len(lines)


def exit_code(found: Sequence[Facts]) -> int:
    """2 where an output isn't there, and nobody makes it."""
    return 2 if any(facts["state"] in ("moved", "no output") for facts in found) else 0


class SlurmJobs:
    """What Slurm says of the jobs that write outputs, asked for no more often than is polite."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, SlurmJob | None]] = {}

    def of(self, path: str) -> SlurmJob | None:
        """The job that writes `path`, if it hasn't ended."""
        from mdattn_mpi.slurm import job_of_output

        asked, job = self._known.get(path, (-ASK_SLURM, None))
        if time.monotonic() - asked >= ASK_SLURM:
            job = job_of_output(path)
            self._known[path] = time.monotonic(), job
        return job


def look(paths: Sequence[str], jobs: SlurmJobs | None = None) -> list[Facts]:
    """Find out about all of `paths`; a folder stands for the outputs in it.

    Raises
    ------
    RejectedError
        There is only one, and no such output.

    """
    from mdattn_mpi.runner.status import status

    jobs = jobs or SlurmJobs()
    expanded = [each for path in paths for each in _outputs(path)]
    if len(expanded) == 1:
        return [status(expanded[0], jobs.of(expanded[0]))]
    found = []
    for path in expanded:
        try:
            found.append(status(path, jobs.of(path)))
        except RejectedError as error:
            found.append({"path": path, "state": "no output", "why": str(error)})
    return found


def _outputs(path: str) -> list[str]:
    """The outputs that `path` stands for: itself, that of a run folder, or those of a folder."""
    from mdattn_mpi.slurm import job_of_script, script_path

    if not Path(path).is_dir():
        return [path]
    if path.rstrip("/").endswith(".run"):
        return [path.rstrip("/").removesuffix(".run")]
    runs = {str(run).removesuffix(".run") for run in Path(path).glob("*.run")}
    found = sorted({*runs, *(str(each) for each in Path(path).glob("*.h5"))})
    found = [each for each in found if each in runs or _is_output(each)]
    if not found and job_of_script(script_path(path)):
        return [path]
    if not found:
        raise RejectedError("holds no output", fix="name an output, or where some are", file=path)
    return found


def _is_output(path: str) -> bool:
    from mdattn_mpi.dataset import open_output

    try:
        open_output(path).close()
    except RejectedError:
        return False
    return True


def lines_of(found: Sequence[Facts]) -> Iterator[str]:
    """Say it to people: all there is of one output, a line of each of several, and their sum."""
    if len(found) == 1:
        yield from _lines(found[0])
        return
    yield from map(brief, found)
    states = Counter(facts["state"] for facts in found)
    items = [facts["items"] for facts in found if facts.get("items")]
    done, total = (sum(each[name] for each in items) for name in ("done", "total"))
    counts = ", ".join(f"{number} {state}" for state, number in states.items())
    yield f"{counted(len(found), 'output')}: {counts}; {done} of {counted(total, 'item')} done"


def brief(facts: Facts) -> str:
    """One output in one line."""
    parts = [facts["state"]]
    if items := facts.get("items"):
        parts.append(f"{items['done']} of {counted(items['total'], 'item')} done")
        parts += [f"{items['failed']} failed"] if items["failed"] else []
    if facts.get("items_per_second"):
        parts += _rate(facts)
    if facts.get("slurm"):
        parts.append(f"Slurm's {facts['slurm']}")
    return printable(f"{facts['path']}: {', '.join(parts)}")


def _rate(facts: Facts) -> list[str]:
    left = duration(facts["seconds_left"])
    return [f"{facts['items_per_second']:.3g} items/s", f"about {left} to go"]


def _lines(facts: Facts) -> Iterator[str]:
    ranks, items = facts.get("ranks", ()), facts.get("items")
    here = [rank for rank in ranks if rank["phase"] != "left"]
    lost = facts["state"] == "lost a rank"  # its note says where everybody was
    number = f", {counted(len(ranks), 'rank')}" if here and not lost else ""
    yield printable(f"{facts['path']}: {facts['state']}{number}")
    if facts["slurm"]:
        yield f"  Slurm's {facts['slurm']}"
    if items:
        failed = f", {items['failed']} failed" if items["failed"] else ""
        done = f"{items['done']} of {counted(items['total'], 'item')} done"
        yield f"  {done}, {items['todo']} left{failed}"
    if facts.get("items_per_second"):
        yield f"  {', '.join(_rate(facts))}"
    if facts.get("ended") is not None:
        spent = f", after {duration(facts['seconds'])} of work" if facts["seconds"] else ""
        yield f"  ended {_age(facts['ended'])} ago{spent}"
    yield from _failures(facts)
    if not lost:
        yield from _ranks(here, facts["state"])
    yield from _advice(facts)


def _failures(facts: Facts) -> Iterator[str]:
    """Why items failed: of a few."""
    failed = list(facts.get("failed", {}).items())
    for name, why in failed[:MOST_FAILED]:
        text = why if name in why else f"{name}: {why}"
        yield from wrapped(f"  failed: {printable(text)}", "    ").splitlines()
    if len(failed) > MOST_FAILED:
        yield f"  and {len(failed) - MOST_FAILED} more: mdattn inspect {shlex.quote(facts['path'])}"


def _ranks(ranks: Sequence[Mapping[str, Any]], state: str) -> Iterator[str]:
    """What each is doing; many ranks that do the same get one line."""
    if len(ranks) <= MOST_RANKS:
        yield from (f"  rank {rank['rank']}: {_doing(rank, state)}" for rank in ranks)
        return
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for rank in ranks:
        alike.setdefault(_what(rank) + _notes(rank, state), []).append(rank)
    for what, those in alike.items():
        longest = _age(max(rank["seconds"] for rank in those))
        yield f"  {name_ranks([rank['rank'] for rank in those])}: {what}, for {longest} at most"


def _doing(rank: Mapping[str, Any], state: str) -> str:
    device = f", {rank['device']}" if rank["device"] else ""
    where = printable(f"({rank['host']}{device})")
    return f"{_what(rank)} for {_age(rank['seconds'])} {where}{_notes(rank, state)}"


def _age(seconds: float) -> str:
    """In tenths of a second at best: clocks of two hosts are no closer."""
    return duration(seconds) if seconds >= 1 else f"{seconds:.1f} s"


def _what(rank: Mapping[str, Any]) -> str:
    item = f" {rank['item']!r}" if rank["item"] else ""
    return printable(f"{rank['phase'] or 'start'}{item}")


def _notes(rank: Mapping[str, Any], state: str) -> str:
    late = state == "running" and rank["seconds"] > rank["deadline"] > 0
    notes = ", past its deadline" if late else ""
    notes += ", stopped" if rank["stopped"] else ""
    return printable(notes + (f", {rank['fault']}" if rank["fault"] else ""))


def _advice(facts: Facts) -> Iterator[str]:
    """What is to be done now, if anything."""
    from mdattn_mpi.lockstep.death_note import message

    path, state = facts["path"], facts["state"]
    run = f"{path}.run"
    if state == "moved":
        yield f"  The output isn't here: it was moved or removed. Where it is now, {run}"
        yield "  belongs beside it, by the output's new name with .run at the end."
    elif state == "unfinished":
        yield f"  Whether a job works on it nobody can say: there is no {run},"
        yield "  as after the output was moved or copied without it."
    elif facts.get("here") is False and facts.get("items"):
        yield "  The output isn't here: it was moved or removed, and its job goes on writing to it."
    if state in ("interrupted", "stopped"):
        command = _resume(path, **facts["begun"]) if "begun" in facts else ""
        yield f"  to go on, run {'this:' if command else 'the same command again'}"
        if command:
            yield f"    {printable(command)}"
    if facts.get("death_note"):
        yield ""
        yield from map(printable, message(facts["death_note"]).splitlines())


def _resume(path: str, command: str, ranks: int) -> str:
    """The command that goes on, as far as the output and what lies beside it tell."""
    from mdattn_mpi.lockstep import Launcher
    from mdattn_mpi.lockstep.death_note import resume_command
    from mdattn_mpi.slurm import script_path

    script = script_path(path)
    if script.exists():
        return shlex.join(["sbatch", str(script)])
    if not command:
        return ""
    launched = Launcher("mpirun" if ranks > 1 else "")
    return resume_command(launched, ranks, ["", "mdattn", *shlex.split(command)[1:]])
