"""One line of the report, and what it says of which ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["OK", "WARN", "FAIL"]
Facts = dict[str, Any]  # of one rank
Ranks = Sequence[Facts]

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


Case = tuple[object, Level, str, str]  # whether it applies, how bad it is, what it is, the fix


def find(check: str, *cases: Case, fine: str) -> Iterator[Finding]:
    """The first case that applies; if none does, that all is well, in the words of `fine`."""
    for applies, level, what, fix in cases:
        if applies:
            yield Finding(check, level, what, fix)
            return
    if fine:
        yield Finding(check, "OK", fine)


@dataclass(frozen=True)
class Some:
    """The ranks that something is true of; in words ``ranks 4, 5 (n2)``."""

    numbers: Sequence[int]
    ranks: Ranks
    hosts: Sequence[str]

    @property
    def first(self) -> Facts:
        """The facts of the first of them; of rank 0 if there are none, and nothing is said."""
        return self.ranks[self.numbers[0] if self.numbers else 0]

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def __str__(self) -> str:
        return who(self.numbers, self.hosts)


@dataclass(frozen=True)
class AllRanks:
    """What all ranks found, by rank."""

    ranks: Ranks
    hosts: Sequence[str]

    def where(self, condition: Callable[[Facts], object]) -> Some:
        """The ranks whose facts fulfil a condition."""
        return self.some(n for n, rank in enumerate(self.ranks) if condition(rank))

    def some(self, numbers: Iterable[int]) -> Some:
        """These ranks."""
        return Some(list(numbers), self.ranks, self.hosts)

    def values(self, value: Callable[[Facts], str]) -> str:
        """A value of all ranks, or each value with those that have it."""
        return by_value([value(rank) for rank in self.ranks], self.hosts)

    def differ(self, value: Callable[[Facts], str]) -> bool:
        """Whether ranks have different values."""
        return len({value(rank) for rank in self.ranks}) > 1
