"""How long a phase may last: long at first, then scaled from what phases have taken."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

_UNSEEN = (-1.0, 0.0)


class Deadlines:
    """The longest time that each phase may take before the watchdog ends the job.

    Parameters
    ----------
    first
        Seconds for a phase that has not been seen yet: it may build engines or wake up disks.
    minimum
        No deadline is shorter than this, in seconds.
    scale
        After that, a phase may take this many times the slowest one seen, more if it has more work.
    fixed
        One deadline for everything, in seconds, instead (``--deadline``).

    """

    def __init__(
        self,
        first: float = 1800.0,
        minimum: float = 60.0,
        scale: float = 20.0,
        fixed: float | None = None,
    ) -> None:
        self.first = max(first, minimum)
        self.minimum = minimum
        self.scale = scale
        self.fixed = fixed or None
        self._seen: dict[str, tuple[float, float]] = {}  # seconds, and seconds per unit of work

    def of(self, phases: str | tuple[str, ...], work: float = 0.0) -> float:
        """Seconds that a phase, or the slowest of several, may take.

        `work` is what they have to do, in any unit, but always the same.
        """
        if self.fixed is not None:
            return self.fixed
        names = (phases,) if isinstance(phases, str) else phases
        seen = [self._seen.get(name, _UNSEEN) for name in names]
        longest, rate = max(seconds for seconds, _ in seen), max(rate for _, rate in seen)
        least = self.first if _UNSEEN in seen else self.minimum
        # Never below what the longest has taken: small items have costs that work doesn't show.
        return max(least, self.scale * longest, self.scale * rate * work)

    def took(self, phase: str, seconds: float, work: float = 0.0) -> None:
        """Learn that `phase` took `seconds`."""
        longest, rate = self._seen.get(phase, _UNSEEN)
        if seconds > longest or (work and seconds > rate * work):
            self._seen[phase] = max(longest, seconds), max(rate, seconds / work if work else 0.0)

    def __str__(self) -> str:
        """For example ``30 s for every phase``."""
        if self.fixed is not None:
            return f"{self.fixed:g} s for every phase"
        return (
            f"{self.first:g} s for the first of its kind, then {self.scale:g} × the slowest seen, "
            f"at least {self.minimum:g} s"
        )


class TimeLimit:
    """When the job must be over: `max_time` seconds from now, or the end of the Slurm allocation.

    ``SLURM_JOB_END_TIME`` counts seconds since 1970; a `max_time` of 0 means no limit.
    """

    def __init__(
        self, max_time: float | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        ends = []
        if max_time:
            ends.append(time.time() + max_time)
        slurm = environment.get("SLURM_JOB_END_TIME", "")
        if slurm.isdecimal() and int(slurm) > 0:
            ends.append(float(slurm))
        self.end: float | None = min(ends) if ends else None

    def time_left(self) -> float | None:
        """Seconds until the job must be over; None without a limit."""
        return None if self.end is None else self.end - time.time()

    def is_near(self, needed: float) -> bool:
        """Whether what takes `needed` seconds would no longer be over in time."""
        left = self.time_left()
        return left is not None and left < needed
