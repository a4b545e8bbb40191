"""Reading and writing bytes at a place in a file, all of them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def read_exactly(fd: int, offset: int, array: np.ndarray[Any, Any]) -> None:
    """Fill a contiguous array from a file; `os.preadv` alone may stop short.

    Raises
    ------
    OSError
        The file ends before, or can't be read.

    """
    buffer = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}: it was cut while open")
        done += count


def write_exactly(fd: int, offset: int, data: Any) -> None:
    """Write a buffer of bytes to a file; `os.pwrite` alone may stop short.

    Raises
    ------
    OSError
        The disk is full, or failed.

    """
    buffer = memoryview(data)
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done:], offset + done)
