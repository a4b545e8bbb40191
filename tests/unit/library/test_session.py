"""What a communicator carries between calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi import backends
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
