"""What the trials that ranks made together mean: see `network` and `filesystem`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mdattn_mpi.doctor.filesystem import BLOCK
from mdattn_mpi.doctor.finding import AllRanks, Case, Finding, Ranks, find
from mdattn_mpi.text import quantity

SLOW = {"MPI": 50e6, "NCCL": 1e9}  # bytes a second and rank
SLOW_FOLDER = 20e6


def judge_rates(library: str, tries: Ranks, hosts: Sequence[str]) -> Iterator[Finding]:
    """Collectives that were tried: right everywhere, and not absurdly slow."""
    for name in ("all-reduce", "all-to-all"):
        found = [rank[name] for rank in tries]
        wrong = AllRanks(found, hosts).where(lambda each: not each["right"])
        rate = min(each["rate"] for each in found)
        yield from find(
            f"{name} {library}",
            (wrong, "FAIL", f"wrong values on {wrong}",
             "take these nodes out (sbatch --exclude) and tell the site"),
            (rate < SLOW[library] and len(tries) > 1, "WARN", f"{quantity(rate, 'B/s')} a rank",
             "check which network is used: jobs/mpi/ says how to choose"),
            fine=f"{quantity(rate, 'B/s')} a rank",
        )  # fmt: skip


def judge_folder(tries: Ranks, hosts: Sequence[str]) -> Iterator[Finding]:
    """What writing and reading one file together was like."""
    job = AllRanks(tries, hosts)
    failed, locked_out = job.where(lambda found: found["error"]), job.where(lambda f: f["locks"])
    blind = job.where(lambda found: not found["shared"])
    wrong = job.where(lambda found: not found["right"])
    write, read = (
        BLOCK * len(tries) / max(1e-9, *(found[f"{way}_seconds"] for found in tries))
        for way in ("write", "read")
    )
    rates = f"written at {quantity(write, 'B/s')}, read at {quantity(read, 'B/s')}, together"
    cases: tuple[Case, ...] = (
        (failed, "FAIL", f"{failed.first['error']} on {failed}",
         "make room or take another folder"),
        (blind, "FAIL", f"{blind} doesn't see the file of rank 0",
         "take a folder on a file system that all nodes share"),
        (wrong, "FAIL", f"{wrong} reads other bytes than were written",
         "take another file system: this one doesn't keep nodes coherent"),
        (write < SLOW_FOLDER, "WARN", rates, "take another file system for the output"),
    )  # fmt: skip
    yield from find("shared file", *cases, fine=rates)
    locks = f"{locked_out.first['locks']} on {locked_out}"
    unlock = "set HDF5_USE_FILE_LOCKING=FALSE"
    yield from find("file locks", (locked_out, "WARN", locks, unlock), fine="")
