"""What arrays may take of a GPU's and of a node's memory."""

from __future__ import annotations

import os

USABLE = 0.8  # of a GPU's memory; of the host's, half: the page cache needs some too


def usable_gpu_memory(nbytes: int) -> int:
    """Bytes of a GPU's memory that arrays may take."""
    return int(nbytes * USABLE)


def usable_host_memory(ranks: int) -> int:
    """Bytes of this node's memory that arrays of each of so many ranks may take."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * ranks)
