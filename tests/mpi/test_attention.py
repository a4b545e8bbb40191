"""The library call, as another MPI program would make it, on real ranks."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest

import mdattn_mpi
from mdattn_mpi.errors import DeviceError, DisagreementError, RejectedError
from mdattn_mpi.problem import FLAT_STRATEGIES, AttentionProblem, Causal
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
MASKED = AttentionProblem(301, 301, 4, 2, 24, 24, "bfloat16", "upper_left", softcap=4.0, sinks=True)
PROBLEMS += [
    replace(MASKED, window=(40, 0)),
    replace(MASKED, causal="none", window=(5, 9), dtype="float16"),
    replace(MASKED, segments=(0, 7, 100, 130)),
]


def shards_of(problem: AttentionProblem, world: Any, order: Any, seed: int = 5) -> tuple[Any, ...]:
    spans = [
        mdattn_mpi.shard_spans(tokens, world.rank, world.size, order)
        for tokens in (problem.q_tokens, problem.kv_tokens, problem.kv_tokens)
    ]
    inputs = random_inputs(problem, seed)
    right = attention(problem, *inputs)
    return (
        [take(array, span) for array, span in zip(inputs, spans, strict=False)] + [*inputs[3:]],
        [take(array, spans[0]) for array in right],
    )


def masks_of(problem: AttentionProblem, sinks: Any = None) -> dict[str, Any]:
    """The options of a call that say what a query sees."""
    names = ("causal", "window", "softcap", "segments")
    return {"sinks": sinks, **{name: getattr(problem, name) for name in names}}


@on_ranks()
def test_every_strategy_mask_and_order(world: Any) -> None:
    for number, problem in enumerate(PROBLEMS):
        order = ("contiguous", "zigzag")[number % 2]
        shards, right = shards_of(problem, world, order)
        before = [array.tobytes() for array in shards]
        for strategy in ("auto", *FLAT_STRATEGIES):
            out, lse = mdattn_mpi.attention(
                world.comm,
                *shards[:3],
                **masks_of(problem, *shards[3:]),
                strategy=strategy,
                order=order,
                return_lse=True,
            )
            assert_close(problem, out, lse, right)
            assert [array.tobytes() for array in shards] == before


@on_ranks(4)
def test_a_ring_of_nodes(world: Any) -> None:
    """The library learns from the launcher which ranks are on one node."""
    problem = AttentionProblem(61, 83, 4, 2, 16, 24, "bfloat16", "lower_right")
    shards, right = shards_of(problem, world, "zigzag")
    options = {"causal": "lower_right", "order": "zigzag", "strategy": "hierarchical"}
    with pytest.raises(RejectedError, match="several nodes"):
        mdattn_mpi.attention(world.comm, *shards[:3], scale=problem.scale, **options)
    for names, fits in (("aabb", True), ("abab", False), ("aaab", False), ("abcd", False)):
        os.environ["SLURMD_NODENAME"] = names[world.rank]
        comm = world.comm.Dup()
        with nullcontext() if fits else pytest.raises(RejectedError, match="several nodes"):
            out, lse = mdattn_mpi.attention(
                comm, *shards[:3], scale=problem.scale, return_lse=True, **options
            )
            assert_close(problem, out, lse, right)
        comm.Free()
    del os.environ["SLURMD_NODENAME"]


@on_ranks(3)
def test_any_number_of_tokens_on_each_rank(world: Any) -> None:
    problem = AttentionProblem(50, 70, 2, 1, 16, 16, "float16", "lower_right", scale=0.25)
    q_ends, kv_ends = [0, 0, 41, 50], [0, 13, 13, 70]
    q, k, v = random_inputs(problem, 8)
    own_q = slice(q_ends[world.rank], q_ends[world.rank + 1])
    own_kv = slice(kv_ends[world.rank], kv_ends[world.rank + 1])
    right = attention(problem, q, k, v)
    for strategy in FLAT_STRATEGIES:
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
        "kernel is 'triton'.*Fix: use auto, cudnn, flash": {"kernel": "triton"},
        'causal is True.*Fix: write causal="upper_left"': {"causal": True},
        'causal is False.*Fix: write causal="none"': {"causal": False},
        "scale is 'half'": {"scale": "half"},
        "deadline is '-1'": {"deadline": -1},
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
        (r"window.*\[5, -1\] on rank 1", {}, {"window": (5, -1)}),
        (r"softcap \(0.0 on rank 0, 2.0 on rank 1\)", {}, {"softcap": 2.0}),
        (r"sinks \(False on rank 0, True on rank 1\)", {}, {"sinks": np.zeros(2, np.float32)}),
    ):
        if not world.rank:
            changes, options = {}, {}
        heads, dtype = changes.get("heads", 2), changes.get("dtype", np.float16)
        q, k, v = (np.ones((3, heads, 8), dtype) for _ in "qkv")
        with pytest.raises(DisagreementError, match=message):
            mdattn_mpi.attention(world.comm, q, k, v, **options)


@on_ranks(2)
def test_other_sinks_are_noticed_in_each_call(world: Any) -> None:
    q, k, v = (np.ones((3, 2, 8), np.float16) for _ in "qkv")
    sinks = np.array([1, 2], np.float32)
    made = mdattn_mpi.Attention(world.comm, q, k, v, sinks=sinks)
    for _ in range(2):
        mdattn_mpi.attention(world.comm, q, k, v, sinks=sinks)
        made.start(q, k, v).wait()
        sinks += 1
    sinks[1] += world.rank
    said = r"values of the sinks.*\(\d+ on rank 0, \d+ on rank 1\)"
    with pytest.raises(DisagreementError, match=said):
        mdattn_mpi.attention(world.comm, q, k, v, sinks=sinks)
    with pytest.raises(DisagreementError, match=said):
        made.start(q, k, v)
    sinks[1] -= world.rank
    assert made.start(q, k, v).wait().shape == (3, 2, 8)  # all is well again


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


@on_ranks(1, 2, 4)
def test_calls_of_one_object_in_flight(world: Any) -> None:
    """Three calls with other contents, waited for in another order than they were started in."""
    problem = AttentionProblem(61, 83, 4, 2, 16, 24, "bfloat16", "lower_right")
    for strategy in FLAT_STRATEGIES:
        calls = [shards_of(problem, world, "zigzag", seed) for seed in range(3)]
        made = mdattn_mpi.Attention(
            world.comm, *calls[0][0], causal="lower_right", scale=np.float32(problem.scale),
            strategy=strategy, order="zigzag", return_lse=True,
        )  # fmt: skip
        assert strategy in repr(made)
        started = [made.start(*shards) for shards, _ in calls]
        assert_close(problem, *started[1].wait(), calls[1][1])
        assert_close(problem, *made.wait(), calls[0][1])
        outputs = made.wait()
        assert_close(problem, *outputs, calls[2][1])
        with pytest.raises(AssertionError):  # the others' results would be noticed
            assert_close(problem, *outputs, calls[0][1])
        for again in (made.wait, started[0].wait):
            with pytest.raises(RejectedError, match=r"no call is under way|was waited for before"):
                again()


@on_ranks(2)
def test_calls_of_two_objects_and_attention_between_them(world: Any) -> None:
    first, second, third = (AttentionProblem(40 + 9 * n, 51, 2, 1, 8, 8) for n in range(3))
    inputs = [shards_of(problem, world, "contiguous") for problem in (first, second, third)]
    a, b = (mdattn_mpi.Attention(world.comm, *shards, return_lse=True) for shards, _ in inputs[:2])
    b.start(*inputs[1][0])
    a.start(*inputs[0][0])
    between = mdattn_mpi.attention(world.comm, *inputs[2][0], return_lse=True)
    assert_close(third, *between, inputs[2][1])
    assert_close(first, *a.wait(), inputs[0][1])
    assert_close(second, *b.wait(), inputs[1][1])


@on_ranks(2)
def test_equal_shapes_are_planned_once(world: Any) -> None:
    """As long as they are equal on all ranks: a rank whose own are the same hears of the others."""
    import mdattn_mpi.strategies

    problem, longer = AttentionProblem(33, 40, 2, 2, 8, 8), AttentionProblem(33, 47, 2, 2, 8, 8)
    shards, right = shards_of(problem, world, "contiguous")
    q, k, v = random_inputs(longer, 5)
    tokens = slice(0, 20) if world.rank == 0 else slice(20, 47)
    own = slice(0, 17) if world.rank == 0 else slice(17, 33)
    plans, choose = [0], mdattn_mpi.strategies.choose

    def counted(*arguments: Any, **options: Any) -> Any:
        plans[0] += 1
        return choose(*arguments, **options)

    mdattn_mpi.strategies.choose = counted
    try:
        for count in (1, 1, 2, 2):
            if count == 2:  # rank 0 has what it had before
                shards = [q[own], k[tokens], v[tokens]]
                right = [array[own] for array in attention(longer, q, k, v)]
                problem = longer
            out, lse = mdattn_mpi.attention(world.comm, *shards, return_lse=True)
            assert_close(problem, out, lse, right)
            assert plans[0] == count
        made = mdattn_mpi.Attention(world.comm, *shards)
        for _ in range(3):
            made.start(*shards)
            assert made.wait().tobytes() == out.tobytes()
        assert plans[0] == 3
    finally:
        mdattn_mpi.strategies.choose = choose


@on_ranks(3)
def test_other_arrays_than_it_was_made_for_are_refused_by_all(world: Any) -> None:
    problem = AttentionProblem(30, 30, 2, 2, 8, 8)
    shards, right = shards_of(problem, world, "contiguous")
    made = mdattn_mpi.Attention(world.comm, *shards, return_lse=True)
    under_way = made.start(*shards)
    one_less = [array[1:] for array in shards] if world.rank == 1 else shards
    half = [array.astype(np.float16) for array in shards] if world.rank == 1 else shards
    for wrong, what in ((one_less, r"bfloat16 \(9, 2, 8\)"), (half, r"float16 \(10, 2, 8\)")):
        with pytest.raises(RejectedError, match=rf"rank 1: q, k, v are {what}.*was made for bfl"):
            made.start(*wrong)
    assert_close(problem, *under_way.wait(), right)  # a call that was under way goes on
    made.start(*shards)
    assert_close(problem, *made.wait(), right)


@on_ranks(2)
def test_ranks_that_wait_for_different_calls_are_told(world: Any) -> None:
    shards, right = shards_of(problem := AttentionProblem(8, 8, 2, 2, 8, 8), world, "contiguous")
    made = mdattn_mpi.Attention(world.comm, *shards, return_lse=True)
    calls = [made.start(*shards) for _ in range(2)]
    with pytest.raises(DisagreementError, match=r"call \(\d+ on rank 0, \d+ on rank 1\)"):
        calls[world.rank].wait()
    for dead in (calls[0].wait, lambda: made.start(*shards)):
        with pytest.raises(RejectedError, match=r"can't be used any more.*Fix: make another"):
            dead()
    again = mdattn_mpi.Attention(world.comm, *shards, return_lse=True)
    again.start(*shards)
    assert_close(problem, *again.wait(), right)


@on_ranks(2)
def test_what_is_no_communicator_gets_a_sentence(world: Any) -> None:
    from mpi4py import MPI

    shards = inputs_for(world)
    half = world.comm.Split(world.rank)
    between = half.Create_intercomm(0, world.comm, 1 - world.rank)
    for comm, what in (
        (None, "comm is None"),
        (0, "comm is a int"),
        (MPI, "comm is a module"),
        (MPI.COMM_NULL, "comm is MPI.COMM_NULL"),
        (between, "comm is an intercommunicator"),
    ):
        for call in (mdattn_mpi.attention, mdattn_mpi.Attention):
            with pytest.raises(RejectedError, match=f"{what}.*Fix: "):
                call(comm, *shards)
    between.Free()
    half.Free()


@pytest.mark.skipif(find_spec("torch") is None, reason="needs PyTorch; see test_arrays.py too")
@on_ranks(1, 2)
def test_tensors_of_pytorch(world: Any) -> None:
    if find_spec("torch") is None:
        return  # ranks run what pytest skips
    torch = import_module("torch")
    for problem in PROBLEMS:
        shards, right = shards_of(problem, world, "contiguous")
        kind = getattr(torch, problem.dtype)
        tensors = [torch.from_numpy(array.view(np.int16)).view(kind) for array in shards[:3]]
        masks = masks_of(problem, *map(torch.from_numpy, shards[3:]))
        strided = [tensor.permute(1, 0, 2).contiguous().permute(1, 0, 2) for tensor in tensors]
        for given in (tensors, strided):
            out, lse = mdattn_mpi.attention(world.comm, *given, **masks, return_lse=True)
            assert (out.dtype, lse.dtype) == (kind, torch.float32)
            values = out.view(torch.int16).numpy().view(shards[0].dtype)
            assert_close(problem, values, lse.numpy(), right)
    tensors[0].requires_grad_()
    with pytest.raises(RejectedError, match="there is no backward pass"):
        mdattn_mpi.attention(world.comm, *tensors)
    with torch.no_grad():
        assert mdattn_mpi.attention(world.comm, *tensors).shape == out.shape


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


LATE = """
import os, sys, time
import numpy as np
from mpi4py import MPI
import mdattn_mpi

comm, folder = MPI.COMM_WORLD, sys.argv[1]
q = np.ones((4, 2, 8), np.float16)
made = mdattn_mpi.Attention(comm, q, q, q{argument})
call = made.start(q, q, q)
if comm.rank == 1:
    time.sleep(1000)
try:
    {act}
except mdattn_mpi.InterruptedJobError as error:
    with open(os.path.join(folder, str(comm.rank)), "w") as file:
        file.write(str(error))
    time.sleep(1.0)  # the launcher ends all with the first: let the other one write too
    os._exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("act", "what"),
    [
        ("call.wait()", "wait"),
        ("made.start(q, q, q)", "start"),
        ("mdattn_mpi.attention(comm, q, q, q{argument})", "attention"),
    ],
)
def test_a_rank_that_never_comes_is_named(tmp_path: Path, act: str, what: str) -> None:
    by_variable = what == "start"
    argument = "" if by_variable else ", deadline=np.float32(1.5)"
    program = LATE.format(act=act.format(argument=argument), argument=argument)
    env = {"MDATTN_DEADLINE": "1.5" if by_variable else "1000"}
    done = mpirun(3, ["-c", program, str(tmp_path)], env=env)
    assert done.returncode == 75, done.stderr
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(said) == {"0", "2"}, done.stderr
    for text in said.values():
        assert f"rank 1 never reached {what} (waited 1.5 s)" in text


def test_on_gpus_a_replayed_call_takes_one_agreement(tmp_path: Path) -> None:
    """What was begun before an agreement that refuses it leaves nothing behind."""
    done = mpirun(2, ["-m", "tests.support.library_job", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all is well") == 2
