"""What a job asks of the file system that all nodes share, counted by a system call tracer."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from tests.support.mpirun import kill_all, launcher, mark_of, start
from tests.support.underway import until

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="there is no strace here")

SECONDS = 4.0


def test_the_board_of_a_young_job_is_opened_by_one_for_all(tmp_path: Path) -> None:
    """An older one is opened less: see tests/unit/lockstep/test_publisher.py."""
    folder, trace = tmp_path / "run", tmp_path / "trace"
    folder.mkdir()
    traced = ("strace", "-f", "-qq", "-ttt", "-s", "9", "-o", str(trace), "-e", "trace=openat")
    job = ["-m", "tests.support.small_job", str(folder), "--items", "100000", "--step", "0.05"]
    process = start(4, job, program=(*traced, *launcher()))
    try:
        until((folder / "board").exists)
        time.sleep(SECONDS)
    finally:
        kill_all(mark_of(process))
        process.communicate(timeout=30)
    board = re.escape(str(folder / "board"))
    opened = re.findall(rf"^(\d+) +([\d.]+) openat\(.*\"{board}\"", trace.read_text(), re.M)
    assert opened
    assert len({thread for thread, _ in opened}) == 1
    times = [float(when) for _, when in opened]
    assert len(times) <= 2 + 2.6 * (times[-1] - times[0])  # 5.4 a second and rank at d201c53
