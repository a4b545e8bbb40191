"""The watchdog."""

from __future__ import annotations

from collections.abc import Callable


def watch(main: Callable[[], int]) -> int:
    """Run `main` under a watchdog; return the exit code."""
    return main()
