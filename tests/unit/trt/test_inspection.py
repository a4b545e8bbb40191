"""What an inspector says of collectives: missed where it is sure, else nothing is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mdattn_mpi.trt.inspection import missing_collectives


def information(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["query"]})


TWO = {"ALL_GATHER": 2}


@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        ([{"Name": "ALL_GATHER of key"}, {"Name": "ALL_GATHER of value"}, "attention"], {}),
        (["comm_allgather_1", "comm_AllGather_2"], {}),
        ([{"Name": "x", "LayerType": "DistCollective"}, {"Name": "[DIST_COLLECTIVE]-[y]"}], {}),
        ([{"Name": "ALL_GATHER of key"}, {"Name": "attention"}], {"ALL_GATHER": 1}),
        ([{"Name": "comm_alltoall"}, {"Name": "attention"}], {"ALL_GATHER": 2}),
        (["attention"], {"ALL_GATHER": 2}),
        (["{ForeignNode[query...output]}"], {}),  # may hold anything
        ([], {}),
    ],
)
def test_missing(layers: list[Any], missing: dict[str, int]) -> None:
    assert missing_collectives(TWO, information(*layers)) == missing


@pytest.mark.parametrize("text", ["", "nothing", "[]", "{}", '{"Layers": 3}'])
def test_what_cannot_be_read_tells_nothing(text: str) -> None:
    assert missing_collectives(TWO, text) == {}
    assert missing_collectives({}, information("attention")) == {}
