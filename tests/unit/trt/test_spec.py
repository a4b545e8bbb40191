"""Few engines for many lengths; what TensorRT can't do is refused with what can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.partition import equal_partition, equal_shards
from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.trt.choice import choose, spec_for
from mdattn_mpi.trt.spec import any_length
from tests.unit.trt.test_library import FULL, RTX

PROBLEM = AttentionProblem(4096, 4096, 8, 2, 64, 64)
CAUSAL = replace(PROBLEM, causal="upper_left")


@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_fifty_lengths_need_one_engine(strategy: Any, ranks: int) -> None:
    problems = [replace(CAUSAL, q_tokens=n, kv_tokens=n) for n in range(977, 50 * 977 + 1, 977)]
    assert len(problems) == 50
    (spec,) = spec_for(problems, strategy, ranks)
    for problem in problems:
        (own,) = spec_for([problem], strategy, ranks)
        assert spec.includes(own)
    assert not spec.includes(replace(own, mask="none"))
    longer = replace(CAUSAL, q_tokens=10**6, kv_tokens=10**6)
    assert not spec.includes(*spec_for([longer], strategy, ranks))
    assert any_length(spec).includes(spec)
    short = replace(CAUSAL, q_tokens=3, kv_tokens=3)
    assert any_length(spec).includes(*spec_for([short], strategy, ranks))


def test_fifty_lengths_of_a_ring() -> None:
    problems = [replace(PROBLEM, q_tokens=8 * n, kv_tokens=8 * n) for n in range(100, 150)]
    (spec,) = spec_for(problems, "ring", 8)
    assert (spec.q.min, spec.q.max) == (100, 149)
    assert not spec.takes_keys


def test_kinds_need_engines_of_their_own() -> None:
    other = replace(PROBLEM, dtype="float16")
    assert len(spec_for([PROBLEM, other, CAUSAL], "allgather", 2)) == 3


@pytest.mark.parametrize(
    ("problem", "strategy", "ranks", "why", "works"),
    [
        (CAUSAL, "ring", 2, "has no mask", "-s allgather"),
        (replace(PROBLEM, q_tokens=4095), "ring", 2, "4095 query tokens on 2", "-s allgather"),
        (replace(PROBLEM, kv_tokens=4095), "ring", 2, "4095 key tokens on 2", "-s allgather"),
        (PROBLEM, "ulysses", 3, "8 query heads don't divide among 3", "-s allgather"),
        (
            replace(PROBLEM, q_heads=12, kv_heads=3),
            "ulysses", 4, "3 kv heads can't be dealt", "-s allgather",
        ),
        (
            replace(CAUSAL, causal="lower_right", q_tokens=4093, kv_tokens=4096),
            "ulysses", 4, "would move the diagonal", "-s allgather",
        ),
        (replace(CAUSAL, q_tokens=5000), "allgather", 2, "mask bends", "-s ulysses"),
        (
            replace(CAUSAL, causal="lower_right", q_tokens=5000),
            "allgather", 2, "first queries see no key", "-b cuda",
        ),
        (replace(PROBLEM, v_head_dim=32), "allgather", 2, "one head dim", "-b cuda"),
        (replace(PROBLEM, window=(128, -1)), "ulysses", 2, "a window", "-b cuda"),
        (replace(PROBLEM, segments=(0, 100)), "allgather", 2, "documents", "-b cuda"),
        (replace(PROBLEM, softcap=30.0, sinks=True), "ring", 2, "a soft cap and sinks", "-b cuda"),
    ],
)  # fmt: skip
def test_refusals(problem: Any, strategy: Any, ranks: int, why: str, works: str) -> None:
    with pytest.raises(RejectedError, match=why) as caught:
        spec_for([problem], strategy, ranks)
    assert works in caught.value.fix


def test_auto_takes_what_can_run_and_says_why_not_the_rest() -> None:
    name, reasons = choose(PROBLEM, "auto", 4, FULL, (10, 0))
    assert (name, reasons) == ("ring", ())
    name, reasons = choose(CAUSAL, "auto", 4, FULL, (10, 0))
    assert name == "ulysses"
    assert "has no mask" in reasons[0]
    name, reasons = choose(PROBLEM, "auto", 4, FULL, (9, 0))
    assert name == "ulysses"
    assert "needs SM 10.0" in reasons[0]
    name, reasons = choose(replace(CAUSAL, q_heads=6, kv_heads=3), "auto", 4, RTX, (12, 0))
    assert name == "allgather"
    assert len(reasons) == 2
    assert choose(PROBLEM, "allgather", 4, FULL, (10, 0)) == ("allgather", ("asked for",))


def test_what_no_strategy_can() -> None:
    with pytest.raises(
        DeviceError, match=r"SM 9\.0.*runs on SM 8\.0, 8\.6, 8\.9, 12\.0 only"
    ) as caught:
        choose(PROBLEM, "auto", 4, RTX, (9, 0))
    assert caught.value.fix == "use -b cuda or -b cpu"
    with pytest.raises(DeviceError) as caught:
        choose(PROBLEM, "allgather", 4, RTX, (9, 0))
    assert "full TensorRT" in caught.value.fix
    with pytest.raises(RejectedError, match="strategy 'star'"):
        choose(PROBLEM, "star", 4, RTX, (9, 0))
    with pytest.raises(RejectedError, match=r"'hierarchical'.*use auto, ring, ulysses, allgather"):
        choose(PROBLEM, "hierarchical", 16, FULL, (10, 0))


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_equal_shards_fill_up_at_the_end_only(tokens: int, ranks: int) -> None:
    shards = equal_shards(tokens, ranks)
    assert [t for span in shards for t in range(span.start, span.stop)] == list(range(tokens))
    length = max(map(len, shards))
    assert length == -(-tokens // ranks)
    for rank, span in enumerate(shards):
        assert span.start == min(rank * length, tokens)
    problem = replace(PROBLEM, q_tokens=tokens, kv_tokens=10)
    parts = equal_partition(problem, ranks)
    assert parts.query == tuple((span,) for span in shards)
    assert parts.kv[0] == (Span(0, -(-10 // ranks)),)
