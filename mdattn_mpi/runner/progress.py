"""What rank 0 shows while a job runs: a bar on a terminal, a line every so often in a log."""

from __future__ import annotations

import sys
from collections import deque
from time import monotonic
from typing import Any, TextIO

from mdattn_mpi.problem import AnyProblem
from mdattn_mpi.text import counted, duration, quantity, wrapped

INDENT = " " * 12
LOG_SECONDS = 30.0
RATE_ITEMS = 50


class Progress:
    """Counts finished items; silent where `shown` is False, but for failures where `quiet`."""

    def __init__(
        self,
        total: int,
        done: int,
        remaining_work: int,
        *,
        shown: bool,
        quiet: bool = False,
        bar: bool = True,
        stream: TextIO = sys.stderr,
    ) -> None:
        self.total = total
        self.done = done
        self.failed = 0
        self.tokens = 0
        self.flops = self.work = 0
        self.remaining_work = remaining_work
        self.started = monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self.started, 0)], maxlen=RATE_ITEMS)
        self._logged = self.started
        self._stream = stream
        self._shown = shown
        terminal = shown and bar and not quiet and stream.isatty()
        self._lines = shown and not quiet and not terminal
        self._bar: Any = None
        if terminal:
            from tqdm import tqdm  # it imports a mail parser: only where a bar is drawn

            self._bar = tqdm(
                total=total, initial=done, unit="item", file=stream, dynamic_ncols=True
            )

    def finished(self, problem: AnyProblem) -> None:
        """Count one finished item."""
        self.done += 1
        self.tokens += problem.tokens
        self.flops += problem.flops
        self.work += problem.work
        self._show()

    def skipped(self, message: str) -> None:
        """Count one failed item and say why."""
        self.failed += 1
        self.say(message)
        self._show()

    def say(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if self._shown:
            write = self._bar.write if self._bar is not None else print
            write(wrapped(message, INDENT), file=self._stream)

    @property
    def eta(self) -> float | None:
        """Seconds to the end, by the work of the most recent items; None before the first."""
        (since, before), now = self._recent[0], monotonic()
        rate = (self.work - before) / max(now - since, 1e-9)
        return (self.remaining_work - self.work) / rate if rate else None

    def _show(self) -> None:
        now = monotonic()
        self._recent.append((now, self.work))
        seconds = max(now - self.started, 1e-9)
        rates = quantity(self.tokens / seconds, "tok/s")
        if self.flops:
            rates += " " + quantity(self.flops / seconds, "FLOP/s")
        if self._bar is not None:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(self.done + self.failed - self._bar.n)
        elif self._lines and now - self._logged >= LOG_SECONDS:
            self._logged = now
            eta = self.eta
            left = f", ETA {duration(eta)}" if eta is not None else ""
            self.say(f"mdattn: {self.done} of {counted(self.total, 'item')}, {rates}{left}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
