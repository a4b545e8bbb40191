"""How fast this machine is: figures of the right size, and nothing left behind."""

from __future__ import annotations

import os
from math import inf
from pathlib import Path

import pytest

from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.runner import speed
from mdattn_mpi.runner.speed import core_flops, disk_bandwidth


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(speed, "PIECE", 1 << 20)


@pytest.mark.parametrize(
    "problem",
    [
        AttentionProblem(1 << 20, 1 << 20, 2, 1, 64, 64),
        AttentionProblem(301, 77, 3, 1, 40, 24, "float16", "lower_right", softcap=2.0),
        AttentionProblem(5000, 5000, 1, 1, 64, 64, causal="upper_left", window=(100, 0)),
        AttentionProblem(900, 900, 1, 1, 64, 64, segments=(0, 300)),
    ],
)
def test_a_core_does_some_operations_whatever_the_item(problem: AttentionProblem) -> None:
    assert 1e6 < core_flops(problem) < 1e13


def test_a_disk_writes_some_bytes_and_keeps_none(tmp_path: Path) -> None:
    for writers in (1, 3):
        assert 1e5 < disk_bandwidth(str(tmp_path), writers) < inf
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_written_nothing_is_known(tmp_path: Path) -> None:
    assert disk_bandwidth(str(tmp_path / "absent"), 1) == inf
