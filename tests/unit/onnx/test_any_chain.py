"""Any few operators behind an attention: what is taken is right, and the rest is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mdattn_mpi.errors import RejectedError

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")

from tests.support.onnx_graph import FLOAT, branch, graph, node  # noqa: E402
from tests.support.sharded_model import Comparison, evaluate  # noqa: E402

HEADS = {"q_num_heads": 4, "kv_num_heads": 4}
SHAPES = ((0, 0, 4, 6), (1, -1, 24), (-1, 24), (4, -1, 6), (0, -1, 12), (-1,), (0, 4, -1, 6))
AXES = st.integers(-3, 2)
_STEPS = """
along reduce transpose reshape like slice gather split running flatten unsqueeze squeeze tile norm
largest added joined multiplied turned count expand branch
"""


class Chain:
    """Operators behind an attention, of which each takes what the one before has made."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {"yes": np.array(True)}
        self.last = self.op("Attention", ["x", "x", "x"], **HEADS)

    def op(self, kind: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> str:
        names = [f"t{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(node(kind, inputs, names, **attributes))
        return names[0]

    def constant(self, values: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(values)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def permutation(self, *values: int) -> list[int]:
        return list(self.draw(st.permutations(values)))

    def step(self) -> None:
        """Add an operator."""
        axis, t = self.draw(AXES), self.last
        match self.one_of(*_STEPS.split()):
            case "along":
                kind = self.one_of("Softmax", "LogSoftmax", "LpNormalization")
                self.last = self.op(kind, [t], axis=axis)
            case "reduce":
                kind = self.one_of("ReduceMean", "ReduceSum", "ReduceMax")
                self.last = self.op(kind, [t, self.integers(axis)], keepdims=self.one_of(0, 1))
            case "transpose":
                perm = self.permutation(*range(self.one_of(2, 3, 3, 4)))
                self.last = self.op("Transpose", [t], perm=perm)
            case "reshape":
                self.last = self.op("Reshape", [t, self.integers(*self.one_of(*SHAPES))])
            case "like":
                self.last = self.op("Reshape", [t, self.op("Shape", ["x"])])
            case "slice":
                cut = [self.integers(value) for value in (0, self.one_of(1, 2, -1), axis)]
                self.last = self.op("Slice", [t, *cut])
            case "gather":
                self.last = self.op("Gather", [t, self.integers(-1, 0)], axis=axis)
            case "split":
                self.last = self.op("Split", [t], 2, axis=axis, num_outputs=2)
            case "running":
                self.last = self.op("CumSum", [t, self.constant(np.int64(axis))])
            case "flatten":
                self.last = self.op("Flatten", [t], axis=axis)
            case "unsqueeze":
                self.last = self.op("Unsqueeze", [t, self.integers(axis)])
            case "squeeze":
                self.last = self.op("Squeeze", [t, self.integers(axis)])
            case "tile":
                self.last = self.op("Tile", [t, self.integers(*self.permutation(1, 1, 2))])
            case "norm":
                scale = self.constant(np.float32([2]))
                self.last = self.op("LayerNormalization", [t, scale], axis=axis)
            case "largest":
                self.last = self.op("TopK", [t, self.integers(1)], 2, axis=axis)
            case "added":
                self.last = self.op(self.one_of("Add", "Mul", "Max"), [t, t])
            case "joined":
                self.last = self.op("Concat", [t, t], axis=axis)
            case "multiplied":
                self.last = self.op("MatMul", self.one_of([t, self.constant(weight())], [t, t]))
            case "turned":
                turned = self.op("Transpose", [t], perm=self.permutation(0, 1, 2))
                self.last = self.op("Add", [t, turned])
            case "count":
                count = self.op("Shape", [t], start=axis, end=axis + 1 or None)
                self.last = self.op("Mul", [t, self.op("Cast", [count], to=FLOAT)])
            case "expand":
                self.last = self.op("Expand", [t, self.integers(*self.permutation(1, 1, 2, 1))])
            case "branch":
                graphs = {f"{name}_branch": self.held(t, name) for name in ("then", "else")}
                self.last = self.op("If", ["yes"], **graphs)

    def held(self, tensor: str, name: str) -> Any:
        """An operator in a branch."""
        kind, axes = self.one_of("ReduceSum", "Unsqueeze"), self.integers(self.draw(AXES))
        made = f"{tensor}_{name}"
        return branch([node(kind, [tensor, axes], [made])], made)

    def model(self) -> Any:
        return graph(self.nodes, {"x": [1, "S", 24]}, {self.last: None}, self.weights)


def weight() -> Any:
    return np.random.default_rng(5).standard_normal((24, 24)).astype("f4")


@st.composite
def chains(draw: st.DrawFn) -> Any:
    chain = Chain(draw)
    for _ in range(draw(st.integers(1, 3))):
        chain.step()
    return chain.model()


@pytest.mark.filterwarnings("ignore:.*encountered in (log|divide)")
@settings(max_examples=150, deadline=None)
@given(model=chains(), strategy=st.sampled_from(["allgather", "ulysses"]), tokens=st.integers(3, 9))
def test_a_chain_is_right_or_refused(model: Any, strategy: str, tokens: int) -> None:
    inputs = {"x": np.random.default_rng(tokens).standard_normal((1, tokens, 24)).astype("f4")}
    try:
        comparison = Comparison(model, inputs, strategy, 2)
    except RejectedError as refused:
        event(f"refused: {refused.what.partition(') ')[2][:40]}")
        return
    try:
        (whole,) = evaluate(model, inputs).values()
    except Exception:  # of any kind: the evaluator doesn't check
        event("no model")
        return
    if not np.isfinite(whole).all():
        event("not finite")
        return
    event("taken")
    comparison.check(control=False)


def test_a_missing_rule_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a softmax over tokens taken, the comparison would see it."""
    from mdattn_mpi.onnx import rules

    nodes = [node("Attention", "xxx", "t", **HEADS), node("Softmax", "t", "y", axis=1)]
    model = graph(nodes, {"x": [1, "S", 24]}, {"y": [1, "S", 24]})
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 7, 24)).astype("f4")}
    with pytest.raises(RejectedError, match="works along the tokens"):
        Comparison(model, inputs, "allgather", 2)
    monkeypatch.setitem(rules.RULES, "Softmax", rules.transpose)
    with pytest.raises(AssertionError, match="y: "):
        Comparison(model, inputs, "allgather", 2).check()
