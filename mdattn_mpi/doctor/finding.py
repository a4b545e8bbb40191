"""One line of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["OK", "WARN", "FAIL"]

NAME_WIDTH = 14


@dataclass(frozen=True)
class Finding:
    """What a check found: how bad it is, in words, and what to do about it."""

    check: str
    level: Level
    what: str
    fix: str = ""

    def __str__(self) -> str:
        """For example ``WARN  stack  1 MiB on all ranks. Fix: ulimit -s 8192``."""
        fix = f". Fix: {self.fix}" if self.fix else ""
        return f"{self.level:<5} {self.check:<{NAME_WIDTH}} {self.what}{fix}"

    def to_dict(self) -> dict[str, str]:
        """The same as JSON has it."""
        return asdict(self)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when all is well, 1 with a warning, 2 with a failure."""
    levels = {finding.level for finding in findings}
    return 2 if "FAIL" in levels else 1 if "WARN" in levels else 0


def by_value(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Who has what: one value for all, or each with its ranks and hosts."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return values[0]
    return "; ".join(f"{value} on {who(ranks, hosts)}" for value, ranks in holders.items())


def who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """For example ``ranks 4, 5 (n2)``; never long."""
    if len(ranks) == len(hosts):
        return "all ranks" if len(ranks) > 1 else "this rank"
    shown = ", ".join(str(rank) for rank in ranks[:4]) + (", …" if len(ranks) > 4 else "")
    names = sorted({hosts[rank] for rank in ranks})
    return (
        f"rank{'s' * (len(ranks) > 1)} {shown} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
    )
