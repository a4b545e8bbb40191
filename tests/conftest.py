"""The order of the tests, and what was running when they are ended from outside."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
# On a busy machine an example may take as long as it likes; the test has a timeout.
settings.register_profile("mdattn", deadline=None)
settings.load_profile("mdattn")

ORDER = ("slurm", "mpi", "cli", "bench", "fuzz", "unit")


class RunningTests:
    """The tests that have begun and not ended, on all workers."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.since: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.since[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.since.pop(nodeid, None)

    def tell(self, number: int, frame: FrameType | None) -> None:
        """Print them, and die of the signal after all."""
        now, writer = time.monotonic(), self.config.get_terminal_writer()
        for nodeid, since in self.since.items():
            writer.line(f"\nended after {now - since:.0f} s in {nodeid}")
        writer.flush()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def pytest_configure(config: pytest.Config) -> None:
    """Watch from the process that prints, not from its workers."""
    if not hasattr(config, "workerinput"):
        running = RunningTests(config)
        config.pluginmanager.register(running)
        signal.signal(signal.SIGTERM, running.tell)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files go to the workers in this order: those that take longest must not come last."""
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(TESTS).parts[0]))
