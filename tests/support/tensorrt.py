"""The installed TensorRT, or a skip that says what is missing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from mdattn_mpi.errors import RejectedError

if TYPE_CHECKING:
    from mdattn_mpi.trt.library import Library


@functools.cache
def _found() -> Library | str:
    from mdattn_mpi.trt.library import find_library

    try:
        return find_library()
    except RejectedError as error:
        return str(error)


needs_tensorrt = pytest.mark.skipif(isinstance(_found(), str), reason=str(_found()))


def library() -> Library:
    """Return TensorRT, or skip the test."""
    found = _found()
    if isinstance(found, str):
        pytest.skip(found)
    return found
