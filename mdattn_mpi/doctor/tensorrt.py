"""What is known of the TensorRT that is installed, from its version alone."""

from __future__ import annotations

from collections.abc import Iterator

from mdattn_mpi.doctor.finding import AllRanks, Finding, find
from mdattn_mpi.trt.versions import faults_of


def tensorrt(job: AllRanks) -> Iterator[Finding]:
    """A TensorRT that is known for faults: which, and what avoids them."""
    version = job.ranks[0]["packages"].get("tensorrt", "")
    known = [fault for fault in faults_of("tensorrt", version) if fault.strategies]
    left = [fault for fault in known if not fault.way_round]
    avoided = ", ".join(fault.name for fault in known if fault.way_round)
    fine = f"with a way round {avoided}" if avoided else "without faults that are known"
    return find(
        "TensorRT",
        (left, "WARN", f"{version} is known for {'; '.join(map(str, left))}",
         "; ".join(dict.fromkeys(fault.fix for fault in left))),
        fine=version and f"{version}, {fine}",
    )  # fmt: skip
