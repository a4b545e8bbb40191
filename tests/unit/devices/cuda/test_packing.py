"""Packed documents: one call of a kernel that takes them, and what it is told of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.devices.cuda import packing
from mdattn_mpi.devices.cuda.attention import ONE, AttentionCall
from mdattn_mpi.devices.cuda.packing import runs
from mdattn_mpi.mask import FULL, LOWER_RIGHT, Band, Span
from mdattn_mpi.partition import Block, blocks
from mdattn_mpi.problem import AttentionProblem, Plan, StrategyName
from tests.unit.devices.cuda import test_step
from tests.unit.devices.cuda.test_device import attend_in_turn, check, in_group, random_inputs

STARTS = (0, 3, 4, 11, 19, 20, 33, 40, 47)
PROBLEM = AttentionProblem(53, 53, 4, 2, 16, 8, "bfloat16", "upper_left", segments=STARTS)


def calls_made(problem: AttentionProblem, kernel: str, strategy: StrategyName) -> list[Any]:
    """Return the calls that each of two ranks made of the kernel."""
    plan, inputs = Plan(problem, strategy, 2), random_inputs(problem, 1)

    def act(device: Any) -> list[AttentionCall]:
        attend_in_turn(device, [plan], [inputs])
        return list(device.kernels._launches._ready)

    return in_group(2, act, kernel=kernel)


def test_blocks_that_follow_each_other_are_one_run() -> None:
    sequence = (Span(0, 53),)
    (run,) = runs(blocks(sequence, sequence, PROBLEM.mask))
    assert run.q == run.kv == Span(0, 53)
    assert run.band == LOWER_RIGHT
    assert run.documents == ((*STARTS, 53), (*STARTS, 53))
    assert [one.documents for one in run.alone] == [ONE] * 9


@pytest.mark.parametrize(
    "block",
    [
        Block(Span(5, 9), Span(8, 12), FULL),  # a row is left out
        Block(Span(4, 9), Span(9, 14), FULL),  # a key
        Block(Span(4, 9), Span(6, 11), FULL),  # keys are seen twice
        Block(Span(4, 9), Span(8, 13), LOWER_RIGHT),  # the first sees more
        Block(Span(4, 9), Span(8, 13), Band(2, None)),
        Block(Span(4, 9), Span(8, 13), Band(6, None)),
    ],
)
def test_other_blocks_are_runs_of_their_own(block: Block) -> None:
    first = Block(Span(0, 4), Span(0, 8), FULL)
    assert [run.blocks for run in runs([first, block])] == [(first,), (block,)]
    assert len(list(runs([first, Block(Span(4, 9), Span(8, 13), FULL)]))) == 1


def test_a_bound_that_hides_nothing_of_a_document_is_no_reason_for_another_call() -> None:
    first = Block(Span(0, 4), Span(0, 8), Band(None, 2))
    short = Block(Span(4, 7), Span(8, 11), FULL)
    last = Block(Span(7, 12), Span(11, 19), Band(7, 2))
    (run,) = runs([first, short, last])
    assert run.band == Band(7, 2)
    (run,) = runs([last._replace(q=Span(0, 5)), Block(Span(5, 6), Span(19, 20), FULL)])
    assert run.band == Band(7, 2)
    longer = Block(Span(4, 8), Span(8, 17), Band(None, 2))  # the bound of 7 would hide a key of it
    assert [each.band for each in runs([last._replace(q=Span(-1, 4), kv=Span(0, 8)), longer])] == [
        Band(7, 2), Band(None, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
def test_flash_takes_documents_in_few_calls(strategy: StrategyName) -> None:
    for made in calls_made(PROBLEM, "flash", strategy):
        assert len(made) <= 3  # one that a border cuts has another number of keys
        assert any(len(call.documents[0]) > 3 for call in made)
    for kernel in ("cudnn", "auto"):
        for made in calls_made(PROBLEM, kernel, strategy):
            assert len(made) >= 4  # of distinct lengths
            assert {call.documents for call in made} == {ONE}


@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (2, 1)])
@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_packed_documents_are_exact(
    strategy: StrategyName, window: tuple[int, int], kernel: str
) -> None:
    causal = "none" if window == (2, 1) else "upper_left"
    problem = replace(PROBLEM, window=window, causal=causal, sinks=kernel == "flash")
    for ranks in (1, 2, 3):
        check([Plan(problem, strategy, ranks)] * 2, 7, kernel)


def test_what_was_recorded_keeps_the_beginnings_that_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two lists of beginnings one is kept; memory of the other would be written again."""
    monkeypatch.setattr(packing, "MOST", 1)
    other = replace(PROBLEM, segments=(0, 10, 11, 25, 30, 50))
    plans = [Plan(problem, "ring", 2) for problem in (PROBLEM, other)] * 4
    held = []

    def among_others(device: Any, plans: list[Plan], inputs: Any) -> list[Any]:
        found = []
        for plan, arrays in zip(plans, inputs, strict=True):
            found += test_step.one_by_one(device, [plan], [arrays])
            held.append([device.upload(np.zeros(8, np.int32)) for _ in range(40)])
        return found

    test_step.check(plans, 3, among_others, kernel="flash", replayed=6)


def test_beginnings_are_uploaded_once() -> None:
    def act(device: Any) -> None:
        first = device._offsets.get((0, 5, 9))
        assert device._offsets.get((0, 5, 9)) is first
        assert device.download(first).wait()[0].tolist() == [0, 5, 9]
        assert first.dtype == np.int32

    in_group(1, act)
