"""Binding a model's tensors to datasets by name and token dim."""

from __future__ import annotations

import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.trt.bindings import Binding, check_bindings, parse_bindings

AXES = {"hidden": 0, "output": 0}


def test_parse() -> None:
    found = parse_bindings(["hidden=items/*/hidden:0", "output=/items/*/out"], AXES)
    assert found == (Binding("hidden", "items/*/hidden", 0), Binding("output", "items/*/out", 0))
    assert [binding.name for binding in found] == ["hidden", "out"]
    assert parse_bindings(["x=items/*/x:2"], {})[0].axis == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hidden", "--bind 'hidden'"),
        ("=items/*/x:0", "--bind"),
        ("hidden=hidden:0", "--bind"),
        ("hidden=items/a/hidden:0", "--bind"),
        ("hidden=items/*/:0", "--bind"),
        ("hidden=items/*/../../x:0", "--bind"),
        ("hidden=items/*/hidden:-1", "'-1' is no dim"),
        ("hidden=items/*/hidden:1", "in 'hidden' dim 0 counts tokens"),
        ("other=items/*/x", "which dim counts tokens"),
    ],
)
def test_what_is_no_binding(text: str, told: str) -> None:
    with pytest.raises(RejectedError, match=told) as caught:
        parse_bindings([text], AXES)
    assert caught.value.fix.startswith("write ")


def test_twice() -> None:
    with pytest.raises(RejectedError, match="'hidden' is bound twice"):
        parse_bindings(["hidden=items/*/a", "hidden=items/*/b"], AXES)


def test_what_matches_nothing() -> None:
    both = parse_bindings(["hidden=items/*/hidden", "output=items/*/out"], AXES)
    inputs, outputs = ["hidden"], ["output"]
    check_bindings(both, inputs, outputs, ["hidden"])
    with pytest.raises(RejectedError, match="no item has 'hidden'") as caught:
        check_bindings(both, inputs, outputs, ["query", "key"], file="data.h5")
    assert caught.value.file == "data.h5"
    assert "key, query" in caught.value.fix
    with pytest.raises(RejectedError, match="no input or output 'hidden'") as caught:
        check_bindings(both, ["states"], outputs, ["hidden"])
    assert "inputs states and outputs output" in caught.value.fix
    with pytest.raises(RejectedError, match="'mask' of the engine is bound to nothing"):
        check_bindings(both, [*inputs, "mask"], outputs, ["hidden"])
