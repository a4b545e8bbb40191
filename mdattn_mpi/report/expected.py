"""What ``mdattn plan --json`` has expected of a job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mdattn_mpi.errors import RejectedError

_MADE_BY = "give what `mdattn plan DATA.h5 --nodes N … --json` has printed"


@dataclass(frozen=True)
class Plan:
    """Seconds from the launcher to the end, and how many of these before the first item."""

    ranks: int
    seconds: float
    starting_seconds: float
    waits_for: str


def read_plan(path: str, ranks: int) -> Plan:
    """Read the plan for so many ranks.

    Raises
    ------
    RejectedError
        It isn't a plan, or one for other numbers of ranks.

    """
    try:
        found = [
            Plan(
                int(each["nodes"] * each["ranks_per_node"]),
                float(each["seconds"]),
                float(each["starting_seconds"]),
                str(each["waits_for"]),
            )
            for each in json.loads(Path(path).read_text())["plans"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RejectedError(
            f"is no plan ({type(error).__name__}: {error})", fix=_MADE_BY, file=path
        ) from error
    for plan in found:
        if plan.ranks == ranks:
            return plan
    sizes = ", ".join(str(plan.ranks) for plan in found) or "none"
    raise RejectedError(
        f"has plans for {sizes} ranks, and the job had {ranks}", fix=_MADE_BY, file=path
    )
