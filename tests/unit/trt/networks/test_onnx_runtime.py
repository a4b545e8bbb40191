"""ONNX Runtime and the interpreter make the same of every network of attention.

So what `test_networks` finds doesn't hang on the interpreter alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mdattn_mpi.problem import AttentionProblem, StrategyName
from mdattn_mpi.trt.versions import Form

pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from tests.support import network_interpreter
from tests.support.attention_network import UNIT, AttentionNetwork
from tests.support.network_interpreter import Ranks
from tests.support.network_onnx import NetworkInOnnxRuntime

STRATEGIES: tuple[StrategyName, ...] = ("ring", "allgather", "ulysses")
MASKS = ("none", "upper_left", "lower_right")


def networks() -> list[Any]:
    """List strategies and masks that can be, on 1 to 8 ranks."""
    return [
        (strategy, mask, ranks)
        for strategy in STRATEGIES
        for mask in MASKS
        for ranks in (1, 2, 3, 4, 8)
        if strategy != "ring" or mask == "none" or ranks == 1
    ]


def made(strategy: StrategyName, mask: Any, ranks: int, dtype: Any, **more: Any) -> Any:
    """Make a network for a length that ranks don't divide, where these may be filled up."""
    tokens = 48 if strategy == "ring" else 45
    heads = 24, 3 if ranks == 3 else 2  # on 4 and 8 ranks `ulysses` repeats them
    problem = AttentionProblem(tokens, tokens, *heads, 8, 8, dtype, mask)
    return AttentionNetwork(problem, strategy, ranks, **more)


def in_onnx_runtime(network: AttentionNetwork) -> NetworkInOnnxRuntime:
    return NetworkInOnnxRuntime(
        network.api, network.network, network.collectives, network.inputs(0)
    )


def check(network: AttentionNetwork) -> None:
    """Hold both executions against each other and against float64, of which zeros are far."""
    unit = UNIT[network.problem.dtype]
    found, expected = network.run(in_onnx_runtime(network).run), network.expected
    # Where sums lie between two values, each may take another one, for the query and the output.
    assert np.abs(found - network.run(network.interpret)).max() <= 4 * unit
    assert np.abs(found - expected).max() < 8 * unit
    assert np.abs(expected).max() > 100 * unit


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("strategy", "mask", "ranks"), networks())
def test_both_agree(strategy: StrategyName, mask: str, ranks: int, dtype: Any) -> None:
    check(made(strategy, mask, ranks, dtype))


@pytest.mark.parametrize("form", [Form(border=True), Form(wide=True), Form(True, True)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_agree_on_every_way_round(strategy: StrategyName, form: Form) -> None:
    check(made(strategy, "none" if strategy == "ring" else "upper_left", 2, "float16", form=form))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
def test_both_agree_on_a_shorter_item_of_a_profile(strategy: StrategyName, mask: Any) -> None:
    longer = AttentionProblem(100, 100, 24, 2, 8, 8, "bfloat16", mask)
    check(made(strategy, mask, 4, "bfloat16", others=(longer,)))


class Alone:
    """A rank to which nothing comes from others."""

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.size = ranks.rank, ranks.size

    def all_gather(self, array: Any) -> list[Any]:
        return [array] * self.size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_forgotten_exchange_is_seen(strategy: StrategyName) -> None:
    network = made(strategy, "none", 3, "float16")
    executed = in_onnx_runtime(network)
    found = network.run(lambda inputs, ranks: executed.run(inputs, Alone(ranks)))
    assert np.abs(found - network.expected).max() > 100 * UNIT["float16"]


@pytest.mark.parametrize("layer", ["SHUFFLE", "ATTENTION_INPUT"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interpreter_that_is_wrong_is_seen(
    strategy: StrategyName, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads in another order, and sums in place of means."""
    network = made(strategy, "none", 3, "float16")
    right = network_interpreter.LAYERS[layer]

    def wrong(*given: Any) -> Any:
        found = right(*given)
        return np.roll(found, 1, 1) if layer == "SHUFFLE" else 2 * found

    monkeypatch.setitem(network_interpreter.LAYERS, layer, wrong)
    with pytest.raises(AssertionError, match=r"assert .* <= "):
        check(network)
