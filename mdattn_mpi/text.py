"""Text for people: paragraphs, counts, durations, quantities; and printing it."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from pathlib import Path

COLUMNS = 80


def wrapped(text: str, indent: str = "  ") -> str:
    """Break every line of `text` at words into lines of 80 columns, unless a word is longer."""
    return "\n".join(
        textwrap.fill(
            line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        for line in text.splitlines()
    )


def counted(number: int, noun: str) -> str:
    """For example ``1 item``, ``12 items``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """For example ``58 µs``, ``12.3 ms``, ``4.2 s``, ``3 min 05 s``, ``11 h 40 min``."""
    if 0 < seconds < 0.0005:
        return f"{seconds * 1e6:.{0 if seconds > 9.5e-6 else 1}f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def quantity(value: float, unit: str) -> str:
    """For example ``1.88 GB/s``: three digits, and the prefix of a power of 1000."""
    return _prefixed(value, 1000, ("", "k", "M", "G", "T", "P"), unit)


def memory_size(nbytes: float) -> str:
    """For example ``1.5 GiB``: three digits, and the prefix of a power of 1024."""
    return _prefixed(nbytes, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), "B")


def _prefixed(value: float, step: int, prefixes: tuple[str, ...], unit: str) -> str:
    *smaller, last = prefixes
    for prefix in smaller:
        if value < 999.5:  # which three digits round to 1000
            return f"{value:.3g} {prefix}{unit}"
        value /= step
    return f"{value:.3g} {last}{unit}"


def install(extra: str) -> str:
    """The command that installs an extra of this package, from the checkout if it runs from one."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "setup.cfg").exists():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install 'mdattn_mpi[{extra}]'"


def printable(value: object) -> str:
    """`value` as text without control characters, which could drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def show(text: str) -> None:
    """Print on standard output at once; a reader that has seen enough may have left."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as in `mdattn inspect … | head`
        stop_showing()


def stop_showing() -> None:
    """Let standard output lead nowhere from now on: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
