"""QuACK without Triton: a gigabyte that its own kernels need, and FlashAttention's don't."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace


def import_quack() -> None:
    """Import QuACK; where Triton isn't installed, with a stand-in that is gone afterwards.

    QuACK's autotuner derives a class from one of Triton's. PyTorch asks whether there is a Triton
    when its compiler is imported, so that comes first.
    """
    if find_spec("triton"):
        return
    importlib.import_module("torch._inductor")
    stand_in = ModuleType("triton")
    cache = SimpleNamespace(FileCacheManager=object)
    stand_in.runtime = SimpleNamespace(cache=cache)  # type: ignore[attr-defined]
    sys.modules["triton"] = stand_in
    try:
        importlib.import_module("quack")
    finally:
        del sys.modules["triton"]
