"""The library call, as another MPI program would make it, on real ranks."""

from __future__ import annotations

from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest

import mdattn_mpi
from mdattn_mpi.errors import DeviceError, DisagreementError, RejectedError
from mdattn_mpi.problem import AttentionProblem, Causal, StrategyName
from tests.support.group import take
from tests.support.mpirun import mpirun
from tests.support.ranks import on_ranks
from tests.support.reference import assert_close, attention, random_inputs

PROBLEMS = [
    AttentionProblem(q, kv, *heads, 24, v_dim, dtype, causal)
    for causal in get_args(Causal)
    for (q, kv), heads, v_dim, dtype in (
        ((301, 301), (4, 2), 24, "bfloat16"),
        ((97, 300), (3, 1), 40, "float16"),
        ((300, 3), (6, 6), 8, "bfloat16"),
    )
]


def shards_of(problem: AttentionProblem, world: Any, order: Any) -> tuple[Any, ...]:
    spans = [
        mdattn_mpi.shard_spans(tokens, world.rank, world.size, order)
        for tokens in (problem.q_tokens, problem.kv_tokens, problem.kv_tokens)
    ]
    inputs = random_inputs(problem, seed=5)
    right = attention(problem, *inputs)
    return (
        [take(array, span) for array, span in zip(inputs, spans, strict=True)],
        [take(array, spans[0]) for array in right],
    )


@on_ranks()
def test_every_strategy_mask_and_order(world: Any) -> None:
    for number, problem in enumerate(PROBLEMS):
        order = ("contiguous", "zigzag")[number % 2]
        shards, right = shards_of(problem, world, order)
        before = [array.tobytes() for array in shards]
        for strategy in ("auto", *get_args(StrategyName)):
            out, lse = mdattn_mpi.attention(
                world.comm,
                *shards,
                causal=problem.causal,
                strategy=strategy,
                order=order,
                return_lse=True,
            )
            assert_close(problem, out, lse, right)
            assert [array.tobytes() for array in shards] == before


@on_ranks(3)
def test_any_number_of_tokens_on_each_rank(world: Any) -> None:
    problem = AttentionProblem(50, 70, 2, 1, 16, 16, "float16", "lower_right", scale=0.25)
    q_ends, kv_ends = [0, 0, 41, 50], [0, 13, 13, 70]
    q, k, v = random_inputs(problem, 8)
    own_q = slice(q_ends[world.rank], q_ends[world.rank + 1])
    own_kv = slice(kv_ends[world.rank], kv_ends[world.rank + 1])
    right = attention(problem, q, k, v)
    for strategy in get_args(StrategyName):
        out, lse = mdattn_mpi.attention(
            world.comm, q[own_q], k[own_kv], v[own_kv],
            causal="lower_right", scale=0.25, strategy=strategy, return_lse=True,
        )  # fmt: skip
        assert_close(problem, out, lse, (right[0][own_q], right[1][own_q]))
        again = mdattn_mpi.attention(
            world.comm, q[own_q], k[own_kv], v[own_kv],
            causal="lower_right", scale=np.float32(0.25), strategy=strategy, return_lse=np.False_,
        )  # fmt: skip
        assert again.tobytes() == out.tobytes()


@on_ranks(4)
def test_groups_of_a_split_communicator_and_messages_of_the_caller(world: Any) -> None:
    """The caller's own messages, any tag, are not taken for ours; half the ranks do their own."""
    from mpi4py import MPI

    problem = AttentionProblem(40, 40, 2, 2, 8, 8)
    pair = world.comm.Split(world.rank % 2)
    box, note = np.zeros(1), np.array([float(world.rank)])
    receiving = pair.Irecv(box, MPI.ANY_SOURCE, MPI.ANY_TAG) if pair.rank == 0 else None
    inputs = random_inputs(problem, seed=world.rank % 2)
    own = mdattn_mpi.shard_spans(40, pair.rank, 2)
    right = attention(problem, *inputs)
    for _ in range(3):
        out, lse = mdattn_mpi.attention(pair, *(take(a, own) for a in inputs), return_lse=True)
        assert_close(problem, out, lse, (take(right[0], own), take(right[1], own)))
    if receiving:
        receiving.Wait()
        assert box[0] == world.rank + 2
    else:
        pair.Send(note, 0, 99)
    pair.Free()


def inputs_for(world: Any, **changes: Any) -> list[Any]:
    arrays = {
        "q": np.ones((3, 4, 8), np.float16),
        "k": np.ones((3, 2, 8), np.float16),
        "v": np.ones((3, 2, 8), np.float16),
    }
    return list({**arrays, **(changes if world.rank == 1 else {})}.values())


@on_ranks(3)
def test_all_ranks_raise_the_same_when_one_has_it_wrong(world: Any) -> None:
    wrong = {
        r"rank 1: q, k, v are float32, float16, float16.*Fix": {"q": np.ones((3, 4, 8), "f4")},
        r"rank 1: list is neither": {"k": [[[1.0]]]},
        r"rank 1: .*\(3, 2, 8\), \(2, 2, 8\)": {"v": np.ones((2, 2, 8), np.float16)},
        r"rank 1: .*\(3, 4, 7\)": {"q": np.ones((3, 4, 7), np.float16)},
        r"rank 1: .*\(3, 4\)": {"q": np.ones((3, 4), np.float16)},
        r"rank 1: ndarray is neither": {"q": np.ones((3, 4, 8), ">f2")},
    }
    for message, changes in wrong.items():
        with pytest.raises(RejectedError, match=message):
            mdattn_mpi.attention(world.comm, *inputs_for(world, **changes))
    for message, options in {
        "causal is 'left'": {"causal": "left"},
        "scale is 0": {"scale": 0},
        "scale is nan": {"scale": float("nan")},
        "strategy is 'star'": {"strategy": "star"},
        "order is 'random'": {"order": "random"},
        "rank 0: holds 1 query tokens; its zigzag share of 7 over 3 ranks is 3": {
            "order": "zigzag"
        },
    }.items():
        q, k, v = inputs_for(world)
        with pytest.raises(RejectedError, match=message):
            mdattn_mpi.attention(world.comm, q[: max(1, 3 * world.rank)], k, v, **options)
    with pytest.raises(RejectedError, match="q_tokens is 0"):
        mdattn_mpi.attention(world.comm, q[:0], k, v)
    with pytest.raises(RejectedError, match="4 query heads are no multiple of 3"):
        mdattn_mpi.attention(world.comm, q, *(np.ones((3, 3, 8), np.float16) for _ in "kv"))
    assert mdattn_mpi.attention(world.comm, q, k, v).shape == (3, 4, 8)  # all is well again


@on_ranks(2)
def test_ranks_that_differ_are_told_in_what(world: Any) -> None:
    for message, changes, options in (
        (r"dtype \('float16' on rank 0, 'bfloat16' on rank 1\)", {"dtype": ml_dtypes.bfloat16}, {}),
        (r"heads.*\[8, 8\] on rank 1|heads.*\[8, 8\]", {"heads": 8}, {}),
        (r"causal \('none' on rank 0, 'upper_left' on rank 1\)", {}, {"causal": "upper_left"}),
        (r"return_lse", {}, {"return_lse": True}),
    ):
        if not world.rank:
            changes, options = {}, {}
        heads, dtype = changes.get("heads", 2), changes.get("dtype", np.float16)
        q, k, v = (np.ones((3, heads, 8), dtype) for _ in "qkv")
        with pytest.raises(DisagreementError, match=message):
            mdattn_mpi.attention(world.comm, q, k, v, **options)


@on_ranks(2)
def test_a_rank_without_memory_takes_nobody_down_and_the_next_call_works(world: Any) -> None:
    from mdattn_mpi.devices.cpu.device import CpuDevice

    problem = AttentionProblem(64, 64, 2, 2, 16, 16)
    shards, right = shards_of(problem, world, "contiguous")
    empty = CpuDevice.empty

    def no_memory(*_: Any) -> Any:
        raise MemoryError

    for _ in range(3):
        if world.rank == 1:
            CpuDevice.empty = no_memory  # type: ignore[method-assign]
        with pytest.raises(DeviceError, match="rank 1: out of host memory"):
            mdattn_mpi.attention(world.comm, *shards, strategy="allgather")
        CpuDevice.empty = empty  # type: ignore[method-assign]
        out, lse = mdattn_mpi.attention(world.comm, *shards, strategy="allgather", return_lse=True)
        assert_close(problem, out, lse, right)


PROGRAM = """
import numpy as np
from mpi4py import MPI
import mdattn_mpi

comm = MPI.COMM_WORLD
tokens = mdattn_mpi.shard_spans(100, comm.rank, comm.size)[0]
rng = np.random.default_rng(3)
q, k, v = (rng.standard_normal((100, 2, 16)).astype(np.float16) for _ in range(3))
out = mdattn_mpi.attention(comm, q[tokens.slice], k[tokens.slice], v[tokens.slice])
scores = np.exp(np.einsum("ind,jnd->nij", q.astype(float), k.astype(float)) / 4)
right = np.einsum("nij,jnd->ind", scores / scores.sum(axis=2, keepdims=True), v.astype(float))
assert np.abs(out - right[tokens.slice]).max() < 2e-3
for _ in range(20):  # what a communicator carries goes when it goes
    copy = comm.Dup()
    mdattn_mpi.attention(copy, q[tokens.slice], k[tokens.slice], v[tokens.slice])
    copy.Free()
if comm.rank == 0:
    print("good")
"""


def test_an_ordinary_mpi_program() -> None:
    """MPI is the program's own: initialized and finalized by mpi4py, as ever."""
    assert mpirun(2, ["-c", PROGRAM], check=True).stdout.strip() == "good"
