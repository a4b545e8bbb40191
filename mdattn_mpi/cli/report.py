"""Write a page about a job: what ran, items over time, where the time went on every rank, a
timeline that can be zoomed, the slowest items and ranks, what failed. It is one HTML file that
needs no network, while the job runs or after, however it ended.

  mdattn report out.h5
  mdattn report out.h5 -o report.html --trace trace.json

Every job keeps what it did in OUT.h5.run/; a resumed job's runs are in one report.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.text import memory_size, show

if TYPE_CHECKING:
    from mdattn_mpi.report.page import Job

EPILOG = "Exit codes: 0 written; 2 no such output, or the page can't be written."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("output", metavar="OUT.h5", help="what the job writes, or wrote")
    html = "the page (default: OUT.h5.html)"
    parser.add_argument("-o", "--html", metavar="REPORT.html", help=html)
    trace = "write all spans for Perfetto (ui.perfetto.dev) too"
    parser.add_argument("--trace", metavar="TRACE.json", help=trace)
    plan = "what `mdattn plan --json` expected of it, to compare"
    parser.add_argument("--plan", metavar="PLAN.json", help=plan)


def main(arguments: argparse.Namespace) -> int:
    """Write the page, and the trace if it is wanted."""
    from mdattn_mpi.report.markup import DOCTYPE
    from mdattn_mpi.report.page import page
    from mdattn_mpi.report.trace import HEAD, trace

    job = _job(arguments.output, arguments.plan)
    _write(arguments.html or f"{arguments.output}.html", [page(job)], DOCTYPE)
    if arguments.trace:
        _write(arguments.trace, trace(job.runs, job.name_of), HEAD)
    return 0


def _job(path: str, plan: str | None) -> Job:
    """Put together what is known about the job that writes `path`."""
    from mdattn_mpi.dataset import open_output
    from mdattn_mpi.lockstep.death_note import message
    from mdattn_mpi.report.expected import read_plan
    from mdattn_mpi.report.page import Job
    from mdattn_mpi.report.runs import read_runs
    from mdattn_mpi.runner.status import status

    with open_output(path) as output:
        rows = [*zip(output.items, output.ledger.entries(), strict=True)]
    facts = status(path)
    try:
        runs = read_runs(Path(f"{path}.run"))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RejectedError(
            f"what the ranks kept can't be understood: {type(error).__name__}: {error}",
            file=f"{path}.run",
            fix="remove events-*.jsonl there for a report without a timeline",
        ) from error
    return Job(
        path=path,
        state=facts["state"],
        counts=facts["items"],
        names=[item.name for item, _ in rows],
        tokens=[item.problem.tokens for item, _ in rows],
        reasons=[entry.reason if entry.state == "failed" else "" for _, entry in rows],
        runs=runs,
        death=message(facts["death_note"]) if facts["death_note"] else "",
        plan=read_plan(plan, len(runs[-1].ranks)) if plan and runs else None,
    )


def _write(path: str, pieces: Iterable[str], start: str) -> None:
    """Write a file; what is there already must begin with `start`, as what we write does."""
    from mdattn_mpi.files import whole_file

    try:
        if Path(path).exists() and not _begins_with(Path(path), start):
            raise RejectedError(
                "is there, and no report or trace of ours", file=path, fix="name another place"
            )
        with (
            whole_file(Path(path)) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.writelines(pieces)
        nbytes = Path(path).stat().st_size
    except OSError as error:
        raise RejectedError(
            f"can't be written: {error.strerror}", file=path, fix="name another place"
        ) from error
    show(f"{path}: {memory_size(nbytes)}")


def _begins_with(path: Path, start: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start.encode()
