"""One log a rank in the run folder; every run appends to it."""

from __future__ import annotations

import logging
from pathlib import Path

LOGGER = logging.getLogger("mdattn_mpi")
FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


def open_log(folder: Path, rank: int) -> Path:
    """Send what the package logs to this rank's file; returns its path."""
    path = folder / f"rank-{rank:04}.log"
    handler = logging.FileHandler(path, encoding="utf-8", errors="surrogateescape")
    handler.setFormatter(logging.Formatter(FORMAT))
    for old in LOGGER.handlers[:]:
        LOGGER.removeHandler(old)
        old.close()
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # the terminal belongs to rank 0's progress
    return path
