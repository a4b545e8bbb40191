"""What a communicator carries between calls."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mdattn_mpi import backends
from mdattn_mpi.library.arrays import crc32_of
from mdattn_mpi.library.call import Planned
from mdattn_mpi.library.session import Session


def test_each_kernel_that_is_asked_for_opens_the_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, str]] = []

    class Opened(SimpleNamespace):
        def close(self) -> None:
            opened.append((self.name, "closed"))

    def open_backend(name: str, group: Any, *, kernel: str) -> Opened:
        opened.append((name, kernel))
        return Opened(name=name, device=(name, kernel))

    monkeypatch.setattr(backends, "open_backend", open_backend)
    monkeypatch.setattr(backends, "StrategyBackend", Opened)
    session = Session(comm=None, world=None)  # type: ignore[arg-type]
    for kernel in ("flash", "cudnn", "flash"):
        with session.device("cuda", kernel) as device:
            assert device == ("cuda", kernel)  # type: ignore[comparison-overlap]
    assert opened == [("cuda", "flash"), ("cuda", "cudnn")]
    opened.clear()
    with session.device("cpu", "flash"), session.device("cpu", "auto"):  # none of theirs
        assert opened == [("cpu", "flash")]
    assert opened[1:] == [("cpu", "closed")]


def test_sinks_on_a_gpu_come_to_the_host_to_be_compared() -> None:
    device = SimpleNamespace(
        adopt=lambda array: array, download=lambda *arrays: SimpleNamespace(wait=lambda: arrays)
    )
    session: Any = SimpleNamespace(device=lambda name, kernel: nullcontext(device))
    plan: Any = SimpleNamespace(backend="cuda")
    planned = Planned(session, plan, "auto")
    one, other = np.array([1, 2], np.float32), np.array([1, 3], np.float32)
    assert planned.crc32_of(one) == planned.crc32_of(one.copy()) == crc32_of(one)
    assert planned.crc32_of(one) != planned.crc32_of(other)
