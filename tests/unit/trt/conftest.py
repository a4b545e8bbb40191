"""TensorRT's objects are destroyed between tests, never inside of TensorRT."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def collected_in_between() -> Iterator[None]:
    """See `mdattn_mpi.trt.library.uncollected`: failed calls leave cycles behind."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()
