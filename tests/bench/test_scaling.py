"""`mdattn bench scaling`: rows of the cost model, and what it is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.problem import FLAT_STRATEGIES


def rows(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert main(["bench", "scaling", "--json", "--lengths", "131072", "--causal", *options]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return found


def test_within_a_node_there_is_no_ring_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    for ranks, network in (("4", "400"), ("8", "100")):
        found = rows(capsys, "--ranks", ranks, "--network", network)
        assert {row["strategy"] for row in found} == set(FLAT_STRATEGIES)
        assert all(0.5 < row["share"] < 1.02 for row in found)


def test_the_network_slows_a_plain_ring_more(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {}
    for network in ("100", "400", "100000"):
        for row in rows(capsys, "--ranks", "64", "--network", network):
            seconds[row["strategy"], network] = row["seconds"]
    ring, nodes = (
        [seconds[name, network] for network in ("100", "400", "100000")]
        for name in ("ring", "hierarchical")
    )
    assert ring[0] > 3 * ring[1] > 3 * ring[2]
    assert ring[1] > 2 * nodes[1]
    assert nodes[0] == nodes[1] == nodes[2]  # its host takes longer than its bytes


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (("--ranks", "12"), "multiples of 8"),
        (("--network", "0"), "at least one"),
        (("--gpus-per-node", "0"), "at least one"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: tuple[str, ...], fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "scaling", *options]) == 2
    assert fix in " ".join(capsys.readouterr().err.split())
