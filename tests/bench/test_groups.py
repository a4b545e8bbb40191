"""``mdattn bench groups``: what it prints is what was promised."""

from __future__ import annotations

import json

import pytest

from mdattn_mpi.bench import groups
from mdattn_mpi.cli import main
from tests.support.mpirun import environment


def test_on_paper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(groups, "SEEDS", 1)
    monkeypatch.setattr(groups, "RANKS", (2, 64))
    assert main(["bench", "groups", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [row["ranks"] for row in figures] == [2, 64] * len(groups.SPREADS)
    assert all(1 <= row["last / mean"] <= 1.03 for row in figures)
    assert all(0.9 <= row["whole / ideal"] <= 1.05 for row in figures)


def test_for_real(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    words = "--run 2 --rounds 1 --items 3 --length 100 --json"
    assert main(["bench", "groups", *words.split()]) == 0
    (row,) = json.loads(capsys.readouterr().out)["figures"]
    assert row["groups"] == 2
    assert row["gain"] == pytest.approx(row["items/s of groups"] / row["items/s of one rank"])
