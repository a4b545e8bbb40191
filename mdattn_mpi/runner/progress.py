"""What rank 0 shows while a job runs: a bar on a terminal, a line every so often in a log."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TextIO

from mdattn_mpi.lockstep import Terminal
from mdattn_mpi.problem import AnyProblem
from mdattn_mpi.text import counted, duration, quantity, wrapped

INDENT = " " * 12
LOG_SECONDS = 30.0
DRAW_SECONDS = 0.25
AFTER_TEXT = 0.5  # seconds that text may take through the launcher, before the bar is drawn again
RATE_ITEMS = 50
LEAST_METER = 6  # columns


class Progress:
    """Counts finished items; silent where `shown` is False, but for failures where `quiet`.

    Parameters
    ----------
    total, done
        Items of the job, and those that were done before it.
    remaining_work
        Operations of those that are left.
    computing
        Seconds that the device has computed so far, and what it is called.
    terminal
        Where to draw a bar, if anywhere.
    stops
        Whether the job was asked to stop; the bar goes away then.

    """

    def __init__(
        self,
        total: int,
        done: int,
        remaining_work: int,
        *,
        shown: bool,
        quiet: bool = False,
        computing: Callable[[], float] = lambda: 0.0,
        device: str = "",
        terminal: Terminal | None = None,
        stops: Callable[[], bool] = lambda: False,
        stream: TextIO | None = None,
    ) -> None:
        self.total = total
        self.done = done
        self.failed = 0
        self.tokens = 0
        self.flops = self.work = 0
        self.remaining_work = remaining_work
        self.started = self._looked = self._logged = monotonic()
        self.share = 0.0  # of the time so far, in which the device has computed
        self.device = device
        self._computing = computing
        self._computed = computing() if device else 0.0
        self._recent: deque[tuple[float, int]] = deque([(self.started, 0)], maxlen=RATE_ITEMS)
        self._stream = stream or sys.stderr
        self._shown = shown
        self._lines = shown and not quiet
        self._terminal = terminal if self._lines else None
        self._stops = stops
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._draw_from = self.started + AFTER_TEXT
        self._drawer = threading.Thread(target=self._draw_on, name="mdattn-bar", daemon=True)
        if self._terminal:
            self._drawer.start()

    def finished(self, problem: AnyProblem) -> None:
        """Count one finished item."""
        self.done += 1
        self.tokens += problem.tokens
        self.flops += problem.flops
        self.work += problem.work
        self._look()

    def skipped(self, message: str) -> None:
        """Count one failed item and say why."""
        self.failed += 1
        self.say(message)
        self._look()

    def say(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if not self._shown:
            return
        with self._lock:
            if self._terminal:
                self._terminal.erase()
            print(wrapped(message, INDENT), file=self._stream, flush=True)
            self._draw_from = monotonic() + AFTER_TEXT

    @property
    def eta(self) -> float | None:
        """Seconds to the end, by the work of the most recent items; None before the first."""
        recent, now = list(self._recent), monotonic()
        since, before = recent[0]
        rate = (self.work - before) / max(now - since, 1e-9)
        return max(0.0, self.remaining_work - self.work) / rate if rate else None

    def facts(self) -> list[str]:
        """What a bar or a line says, the most important first."""
        seconds = max(monotonic() - self.started, 1e-9)
        found = [f"{self.done}/{counted(self.total, 'item')}"]
        if self.failed:
            found.append(f"{self.failed} failed")
        if (eta := self.eta) is not None:
            found.append(f"ETA {duration(eta)}")
        if self.tokens:
            found.append(quantity(self.tokens / seconds, "tok/s"))
        if self.share:
            found.append(f"{self.device} {self.share:.0%}")
        if self.flops:
            found.append(quantity(self.flops / seconds, "FLOP/s"))
        return found

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._terminal:
            self._over.set()
            self._drawer.join()

    def _look(self) -> None:
        """Take note of the time, now and then of the device's; say where we are, in a log."""
        now = monotonic()
        self._recent.append((now, self.work))
        if self.device and now - self._looked >= DRAW_SECONDS:
            self._looked = now
            self.share = min(1.0, (self._computing() - self._computed) / (now - self.started))
        if self._lines and not self._terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            self.say(f"mdattn: {', '.join(self.facts())}")

    def _draw_on(self) -> None:
        """Draw the bar, until the end or a wish to stop; then take it away."""
        terminal = self._terminal
        assert terminal is not None
        ascii_only = "utf" not in (self._stream.encoding or "").lower()
        while not self._over.wait(DRAW_SECONDS):
            with self._lock:
                if monotonic() >= self._draw_from and not self._stops():
                    count = self.done + self.failed
                    columns = terminal.columns - 1
                    terminal.draw(bar(count, self.total, self.facts(), columns, ascii_only))
            if self._stops():  # after drawing, too: the watchdog may have erased it meanwhile
                break
        with self._lock:
            terminal.erase()


def bar(
    count: int, total: int, facts: Sequence[str], columns: int, ascii_only: bool = False
) -> str:
    """Draw a meter, and as many of `facts` as find room, into `columns`."""
    while len(facts) > 1 and len(", ".join(facts)) > columns - len("100% "):
        facts = facts[:-1]
    text = ", ".join(facts)
    meter = "|{bar}|" if columns - len("100%||  ") - len(text) >= LEAST_METER else ""
    from tqdm import tqdm  # it imports a mail parser: only where a bar is drawn

    drawn: str = tqdm.format_meter(
        count, total, 0, ncols=columns, ascii=ascii_only,
        bar_format=f"{{percentage:3.0f}}%{meter} {text}",
    )  # fmt: skip
    return drawn
