"""The CUDA device over a double of its libraries: results, whatever order streams run in."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.open import open_cuda
from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.mask import FULL
from mdattn_mpi.partition import Block, partition_of
from mdattn_mpi.problem import AttentionProblem, Plan, Span, StrategyName
from mdattn_mpi.strategies import STRATEGIES
from mdattn_mpi.strategies.rehearsal import rehearse
from tests.support.fake_gpu import FakeLibraries, Machine
from tests.support.fake_group import FakeGroup
from tests.support.group import take
from tests.support.reference import TOLERANCE, attention, problems, random_inputs

Array = NDArray[Any]
NAMES = get_args(StrategyName)


def in_group(
    ranks: int,
    act: Callable[[CudaDevice], Any],
    seed: int = 0,
    machine: Machine | None = None,
    **wrong: Any,
) -> list[Any]:
    """Open a device on every rank, each a thread; return what `act` returned, or raise."""
    machine, shared = machine or Machine(seed), {}
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []
    options = {name: wrong.pop(name) for name in ("transfer", "kernel", "replays") if name in wrong}
    wrong = {"gpus": ranks, **wrong}

    def run(rank: int) -> None:
        try:
            libraries = FakeLibraries(machine, **wrong)
            device = open_cuda(FakeGroup(rank, ranks, shared), seam=libraries, **options)
            results[rank] = act(device)
            gc.collect()
            device.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not errors:
        threads[0].join(0.05)
        threads[-1].join(0.05)
    if errors:
        raise errors[0]
    return results


def attend_in_turn(
    device: CudaDevice, plans: list[Plan], inputs: list[tuple[Array, ...]], **options: Any
) -> list[tuple[Array, Array]]:
    """Do as a batch does: begin an item before the one before it is enqueued."""

    def begin(plan: Plan, arrays: tuple[Array, ...]) -> Any:
        owners = partition_of(plan)
        spans = (owners.query, owners.kv, owners.kv)
        shards = [take(array, s[device.rank]) for array, s in zip(arrays, spans, strict=False)]
        shards += arrays[3:]  # sinks
        steps = STRATEGIES[plan.strategy](device, plan, *map(device.upload, shards), **options)
        next(steps)
        return steps

    def enqueue(steps: Any) -> Any:
        return device.download(*run_to_end(steps))

    downloads, running = [], None
    for plan, arrays in zip(plans, inputs, strict=True):
        following = begin(plan, arrays)
        if running:
            downloads.append(enqueue(running))
        running = following
        del following
    downloads.append(enqueue(running))
    return [download.wait() for download in downloads]


def check(plans: list[Plan], seed: int, kernel: str = "auto", **options: Any) -> None:
    inputs = [random_inputs(plan.problem, seed + index) for index, plan in enumerate(plans)]
    shards = in_group(
        plans[0].ranks,
        lambda device: attend_in_turn(device, plans, inputs, **options),
        seed,
        kernel=kernel,
    )
    for index, (plan, arrays) in enumerate(zip(plans, inputs, strict=True)):
        out = np.full((*arrays[0].shape[:2], arrays[2].shape[2]), np.nan, arrays[0].dtype)
        lse = np.full(arrays[0].shape[:2], np.nan, np.float32)
        for spans, results in zip(partition_of(plan).query, shards, strict=True):
            start = 0
            for span in spans:
                out[span.slice] = results[index][0][start : start + len(span)]
                lse[span.slice] = results[index][1][start : start + len(span)]
                start += len(span)
        right, right_lse = attention(plan.problem, *arrays)
        # Results that are merged have been rounded to 16 bits once before: twice the tolerance.
        bound = 2 * TOLERANCE[plan.problem.dtype] * (1 + np.abs(right))
        assert (np.abs(out.astype(float) - right) <= bound).all()
        np.testing.assert_allclose(lse, right_lse, rtol=1e-4, atol=1e-4)


def for_kernel(problem: AttentionProblem, kernel: str) -> AttentionProblem:
    """The same with head dims that cuDNN takes, and no soft cap, which it doesn't."""
    return replace(
        problem,
        head_dim=8 * (1 + problem.head_dim % 3),
        v_head_dim=8 * (1 + problem.v_head_dim % 3),
        softcap=0.0 if kernel == "cudnn" else problem.softcap,
    )


@pytest.mark.parametrize("strategy", NAMES)
@settings(max_examples=10, deadline=None)
@given(
    st.lists(problems(max_tokens=40), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(),
    st.sampled_from(["cudnn", "flash"]),
)
def test_a_batch_is_right_in_whatever_order_streams_run(
    strategy: StrategyName, batch: list[AttentionProblem], ranks: int, seed: int, kernel: str
) -> None:
    plans = [Plan(for_kernel(problem, kernel), strategy, ranks) for problem in batch]
    check(plans, abs(seed), kernel=kernel)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(problems(max_tokens=40), min_size=1, max_size=3),
    st.sampled_from([(2, 2), (3, 2), (2, 3), (1, 3)]),
    st.integers(0, 1000),
    st.sampled_from(["cudnn", "flash"]),
)
def test_so_is_one_over_nodes(
    batch: list[AttentionProblem], nodes: tuple[int, int], seed: int, kernel: str
) -> None:
    """What is gathered must not be overwritten before it was attended to, nor sent on too early."""
    count, size = nodes
    plans = [
        Plan(for_kernel(problem, kernel), "hierarchical", count * size, node_size=size)
        for problem in batch
    ]
    check(plans, seed, kernel=kernel)


@settings(max_examples=10, deadline=None)
@given(
    problems(max_tokens=40),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.integers(0, 30),
    st.sampled_from(["cudnn", "flash"]),
)
def test_a_head_start_changes_no_result(
    problem: AttentionProblem, ranks: int, seed: int, rows: int, kernel: str
) -> None:
    plan = Plan(for_kernel(problem, kernel), "allgather", ranks)
    check([plan, plan], seed, kernel=kernel, head_start=rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_a_long_ring_folds_what_it_has(kernel: str, seed: int) -> None:
    problem = AttentionProblem(31, 37, 2, 1, 8, 16, "bfloat16", "lower_right")
    check([Plan(problem, "ring", 10)], seed=seed, kernel=kernel)


def error_of(shards: list[Any], plan: Plan, right: Array) -> float:
    """‖output − right‖ over all ranks."""
    parts = [
        (results[0][0].astype(float), take(right, spans))
        for spans, results in zip(partition_of(plan).query, shards, strict=True)
    ]
    return float(np.sqrt(sum(((found - wanted) ** 2).sum() for found, wanted in parts)))


@pytest.mark.parametrize("causal", ["none", "upper_left"])
@pytest.mark.parametrize("ranks", [2, 5])
def test_a_ring_is_as_exact_as_one_gpu(ranks: int, causal: Any) -> None:
    problem = AttentionProblem(333, 333, 4, 2, 64, 64, "bfloat16", causal)
    inputs = random_inputs(problem, 7)
    right, _ = attention(problem, *inputs)

    def error(ranks: int, kernel: str) -> float:
        plan = Plan(problem, "ring", ranks)
        shards = in_group(
            ranks, lambda device: attend_in_turn(device, [plan], [inputs]), kernel=kernel
        )
        return error_of(shards, plan, right)

    alone = error(1, "cudnn")
    assert error(1, "flash") == pytest.approx(alone)
    assert error(ranks, "flash") <= 1.05 * alone
    assert error(ranks, "cudnn") > 1.05 * alone  # results of 16 bits are rounded twice


@pytest.mark.parametrize("strategy", NAMES)
def test_sinks_cost_no_exactness(strategy: StrategyName) -> None:
    """Results are in float32 until the sinks are added, where the kernel can."""
    problem = AttentionProblem(333, 333, 4, 2, 64, 64, "bfloat16", window=(70, 20), sinks=True)
    inputs = random_inputs(problem, 7)
    right, _ = attention(problem, *inputs)

    def error(kernel: str) -> float:
        plan = Plan(problem, strategy, 2)
        shards = in_group(2, lambda device: attend_in_turn(device, [plan], [inputs]), kernel=kernel)
        return error_of(shards, plan, right)

    once = float(np.linalg.norm(right.astype(inputs[0].dtype).astype(float) - right))
    assert error("flash") <= 1.05 * once
    assert error("cudnn") > 1.05 * once


def test_where_one_result_is_all_there_is_nothing_to_merge() -> None:
    calls = []

    def act(device: CudaDevice) -> None:
        device._gpu.merge = lambda call, stream: calls.append(call)
        plan = Plan(AttentionProblem(30, 30, 2, 2, 8, 8, causal="lower_right"), "allgather", 2)
        attend_in_turn(device, [plan], [random_inputs(plan.problem, 1)])

    in_group(2, act)
    assert calls == []


@pytest.mark.parametrize(
    ("kernel", "ranks", "partials"),
    # In shards of 16 bits: one more output of cuDNN's; of FlashAttention's, in float32, one for
    # every step, up to the one where all are folded, two that wait, and one under way.
    [("cudnn", 2, 1), ("flash", 2, 4), ("flash", 4, 8), ("flash", 8, 8)],
)
def test_a_ring_holds_few_partial_results(kernel: str, ranks: int, partials: int) -> None:
    rows = 1024
    problem = AttentionProblem(ranks * rows, ranks * rows, 1, 1, 128, 128)
    shard = rows * 128 * 2

    def act(device: CudaDevice) -> int:
        attend_in_turn(device, [Plan(problem, "ring", ranks)], [random_inputs(problem, 1)])
        return device.memory.peak

    # Query, key, value and output, and two shards of key and value more (of two ranks: one).
    own = 6 if ranks == 2 else 8
    slack = 5 * rows * 4 + (4 << 20)  # LSEs, and a workspace a lane
    peaks = in_group(ranks, act, kernel=kernel)
    assert (own + partials - 1) * shard < max(peaks) <= (own + partials) * shard + slack


def test_nothing_stays_in_use_after_a_batch() -> None:
    problem = AttentionProblem(50, 50, 2, 2, 8, 8)

    def act(device: CudaDevice) -> tuple[int, int]:
        plan = Plan(problem, "ring", 2)
        used = []
        for _ in range(2):
            attend_in_turn(device, [plan] * 6, [random_inputs(problem, i) for i in range(6)])
            gc.collect()
            used.append(device.memory.in_use)
        return used[0], used[1]

    for before, after in in_group(2, act):
        assert before == after  # the workspaces of the two streams
        assert after <= 2 << 20


def test_partial_results_wait_for_who_had_their_memory_before() -> None:
    problem = AttentionProblem(64, 64, 2, 2, 32, 32, "float16")
    q, k, v = random_inputs(problem, 1)
    before = np.arange(q.size, dtype=np.float32).reshape(q.shape)  # as large as they are

    def act(device: CudaDevice) -> Array:
        arrays = [device.upload(array) for array in (q, k, v)]
        accumulator = device.accumulator(arrays[0], 32, problem.scale, merged=Span(0, 64))
        earlier = device.upload(before)
        place = earlier.address
        device._downwards.leaves = False  # else other memory is taken as long as there is some
        download = device.download(earlier)
        del earlier
        for keys in (Span(0, 32), Span(32, 64)):
            device.attend(accumulator, [Block(Span(0, 64), keys, FULL)], *arrays[1:])
        assert accumulator.regions[0].wide is not None
        assert accumulator.regions[0].wide.address == place
        device.finish(accumulator)
        found: Array = download.wait()[0]
        return found

    for seed in range(12):
        np.testing.assert_array_equal(in_group(1, act, seed)[0], before)


def test_pinned_memory_is_used_again() -> None:
    def act(device: CudaDevice) -> bool:
        first = device.host.empty((100, 3), np.dtype(np.float16))
        address = first.ctypes.data
        del first
        second = device.host.empty((99, 3), np.dtype(np.float16))
        assert device.host.empty((0, 3), np.dtype(np.float16)).size == 0
        return bool(second.ctypes.data == address)

    assert in_group(1, act) == [True]


def test_copies_of_strided_arrays() -> None:
    def act(device: CudaDevice) -> tuple[Array, Array]:
        source = np.arange(5 * 4 * 8, dtype=np.float16).reshape(5, 4, 8)
        whole = device.upload(source)
        part = device.empty((5, 2, 8), whole)
        device.copy(whole[:, 1:3], part)
        again = device.empty((5, 4, 8), whole)
        device.copy(whole, again)
        device.copy(part, again[:, 0:2])
        return device.download(part).wait()[0], device.download(again).wait()[0]

    part, again = in_group(1, act)[0]
    source = np.arange(5 * 4 * 8, dtype=np.float16).reshape(5, 4, 8)
    assert (part == source[:, 1:3]).all()
    assert (again[:, :2] == source[:, 1:3]).all()
    assert (again[:, 2:] == source[:, 2:]).all()


@pytest.mark.parametrize("seed", range(8))
def test_calls_in_all_streams_see_what_was_copied_before(seed: int) -> None:
    problem = AttentionProblem(16, 24, 2, 2, 8, 8, "float16")
    q, k, v = random_inputs(problem, seed)

    def act(device: CudaDevice) -> Array:
        arrays = [device.upload(array) for array in (q, k, v)]
        copies = [device.empty(array.shape, array) for array in arrays]
        for array, copied in zip(arrays, copies, strict=True):
            device.copy(array, copied)
        accumulator = device.accumulator(copies[0], 8, problem.scale)
        for keys in (Span(0, 6), Span(6, 12), Span(12, 18), Span(18, 24)):
            device.attend(accumulator, [Block(Span(0, 16), keys, FULL)], *copies[1:])
        found: Array = device.download(*device.finish(accumulator)).wait()[0]
        return found

    right, _ = attention(problem, q, k, v)
    bound = 2 * TOLERANCE["float16"] * (1 + np.abs(right))
    assert (np.abs(in_group(1, act, seed)[0].astype(float) - right) <= bound).all()


@pytest.mark.parametrize(("kernel", "fix"), [("auto", "-b cpu"), ("cudnn", "--kernel flash")])
def test_what_no_kernel_can_do_is_refused_before_the_job(kernel: str, fix: str) -> None:
    problem = AttentionProblem(50, 50, 2, 2, 12, 12)
    with pytest.raises(RejectedError, match=f"head dims 12 and 12.*multiple of 8.*{fix}"):
        in_group(1, lambda device: device.check(problem), kernel=kernel)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"kernel": "cudnn"}, r"no soft cap.*Fix: use --kernel flash, or -b cpu"),
        ({"no_flash": "isn't there"}, r"no soft cap; not flash: rank 0: isn't there.*-b cpu"),
    ],
)
def test_a_soft_cap_is_refused_where_only_cudnn_is(wrong: dict[str, Any], what: str) -> None:
    problem = AttentionProblem(50, 50, 2, 2, 16, 16, causal="upper_left", softcap=30.0)
    with pytest.raises(RejectedError, match=what) as refused:
        in_group(1, lambda device: device.check(problem), **wrong)
    assert "multiples of 8" not in str(refused.value)
    choice = in_group(1, lambda device: device.check(problem), kernel="flash")
    assert "flash: asked for" in choice[0][0]


def test_out_of_memory_says_how_much_and_what_to_do() -> None:
    def act(device: CudaDevice) -> None:
        like = device.upload(np.zeros((1, 1, 8), np.float16))
        device.empty((1 << 30, 1, 8), like)

    with pytest.raises(DeviceError, match=r"16 GiB more were needed.*-s ring"):
        in_group(1, act)


def test_messages_that_do_not_match_are_an_error() -> None:
    def act(device: CudaDevice) -> None:
        like = device.upload(np.zeros((4, 1, 8), np.float16))
        peer = 1 - device.rank
        device.exchange(
            [(like[0 : 2 + device.rank], peer)],
            [(device.empty((2, 1, 8), like), peer)],
        )

    with pytest.raises(DeviceError, match="expects 32 bytes where 48 come"):
        in_group(2, act)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"gpus": 1},
            DeviceError,
            r"rank 1: 2 ranks on this node and 1 visible GPUs.*gpus-per-task",
        ),
        ({"sm": (7, 5)}, RejectedError, "SM 7.5"),
        (
            {"library_major": 14},
            DeviceError,
            "driver of Double is for CUDA 13.0.*update the NVIDIA",
        ),
        ({"missing": "there is no NVIDIA driver"}, DeviceError, "no NVIDIA driver"),
        (
            {"missing": "not installed: nccl4py (pip install 'mdattn_mpi[cuda]')"},
            RejectedError,
            "nccl4py.*pip install 'mdattn_mpi",
        ),
        ({"pci_bus_id": "0000:01:00.0"}, DeviceError, "ranks 0 and 1 on .* have the same GPU"),
        ({"transfer": "pigeon"}, RejectedError, "pigeon"),
    ],
)
def test_what_can_be_wrong_at_the_start(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        in_group(2, lambda device: None, **wrong)


def test_nobody_waits_for_a_rank_whose_copies_can_not_be_opened() -> None:
    handles = iter([bytes(64)])

    def ipc_handle(address: int) -> bytes:
        found = next(handles, None)  # the second rank to ask gets none
        if found is None:
            raise DeviceError("no handle is left")
        return found

    with pytest.raises(DeviceError, match="no handle is left"):
        in_group(2, lambda device: None, ipc_handle=ipc_handle, transfer="copy")


def test_different_gpus_in_one_group_are_refused() -> None:
    from mdattn_mpi.devices.cuda.open import _check_alike

    facts = [
        {"host": "a", "pci_bus_id": str(i), "name": name} for i, name in enumerate(("A100", "H100"))
    ]
    with pytest.raises(RejectedError, match="A100 on rank 0; H100 on rank 1"):
        _check_alike(facts)


@pytest.mark.parametrize(
    ("wrong", "described", "reason"),
    [
        ({}, "flash double, else cudnn double", r"kernel flash: 1.21 × .* SM 9.0.*in float32"),
        (
            {"no_flash": "flash-attn-4 isn't installed"},
            "cudnn double",
            "kernel cudnn: flash would be faster, but rank 0: flash-attn-4 isn't.*in bfloat16",
        ),
        ({"sm": (10, 0)}, "cudnn double", "kernel cudnn: flash wasn't measured on SM 10.0"),
        ({"kernel": "cudnn"}, "cudnn double", "kernel cudnn: asked for"),
        ({"kernel": "flash", "sm": (10, 0)}, "flash double", "flash: asked for; built.*never exec"),
    ],
)
def test_the_kernel_is_chosen_by_what_was_measured(
    wrong: dict[str, Any], described: str, reason: str
) -> None:
    problem = AttentionProblem(50, 50, 2, 2, 64, 64)

    def act(device: CudaDevice) -> tuple[str, str]:
        return device.describe()["kernel"], device.check(problem)[0]

    for found, why in in_group(2, act, **wrong):
        assert found == described
        assert re.search(reason, why)


def test_all_ranks_do_without_what_one_of_them_lacks() -> None:
    answers = iter(["", "flash-attn-4 isn't installed"])  # of whichever rank comes second

    def act(device: CudaDevice) -> str:
        return device.describe()["kernel"]

    assert in_group(2, act, no_flash=answers) == ["cudnn double"] * 2
    with pytest.raises(RejectedError, match=r"isn't there on all ranks; rank 0: none.*--kernel"):
        in_group(2, act, no_flash="none", kernel="flash")


def test_calls_that_were_rehearsed_are_ready_when_they_come() -> None:
    problems = [AttentionProblem(n, n, 2, 1, 8, 8, causal="upper_left") for n in (40, 48, 64)]
    problems += [replace(problems[2], window=(9, 0), sinks=True, segments=(0, 30))]

    def act(device: CudaDevice) -> list[tuple[set[Any], set[Any]]]:
        found = []
        for strategy in NAMES:
            plans = [Plan(problem, strategy, 2) for problem in problems]
            for plan in plans:
                calls = rehearse(STRATEGIES[strategy], plan, device.rank)
                device.prepare(plan.problem, calls)
            launches = device.kernels._launches
            expected = {call: coming.result() for call, coming in launches._coming.items()}
            attend_in_turn(device, plans, [random_inputs(p, 1) for p in problems])
            found.append((set(expected), set(launches._ready)))
            assert all(launches._ready[call] is launch for call, launch in expected.items())
            launches._ready.clear()
            assert not launches._coming
        return found

    for kernel in ("cudnn", "flash"):
        for found in in_group(2, act, kernel=kernel):
            for expected, made in found:
                assert expected == made
                assert len(made) >= 3


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
def test_a_lone_call_asks_the_driver_seldom(strategy: str) -> None:
    problem = AttentionProblem(256, 256, 4, 4, 16, 16, "float16")

    def act(device: CudaDevice) -> list[int]:
        plan, shards = Plan(problem, strategy, 2), zeros(problem)  # type: ignore[arg-type]
        asked: list[int] = []
        count_calls(device._gpu, asked)
        arrays = [device.upload(shard) for shard in shards]
        for _ in range(6):
            asked.append(0)
            steps = STRATEGIES[plan.strategy](device, plan, *arrays)
            next(steps)
            next(steps, None)
        return asked[3:]

    for counts in in_group(2, act):
        assert all(10 < count <= 24 for count in counts), counts


def zeros(problem: AttentionProblem) -> list[Any]:
    shape = (problem.q_tokens // 2, problem.q_heads, problem.head_dim)
    return [np.zeros(shape, np.float16) for _ in range(3)]


CALLS = (
    "record", "wait", "copy", "copy_rows", "raise_flag", "await_flag", "merge", "fill", "launch",
)  # fmt: skip


def count_calls(gpu: Any, asked: list[int]) -> None:
    """Add each call that enqueues something to the last of `asked`."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **options: Any) -> Any:
            if asked:
                asked[-1] += 1
            return call(*args, **options)

        return ask

    for name in CALLS:
        setattr(gpu, name, counted(getattr(gpu, name)))


def test_head_start_covers_the_gathering() -> None:
    def act(device: CudaDevice) -> list[int]:
        lengths = (8192, 16384, 131072)
        return [device.head_start(AttentionProblem(n, n, 8, 8, 128, 128)) for n in lengths]

    too_short, short, long = in_group(2, act)[0]
    assert too_short == 0
    assert 1024 <= short <= 4096
    assert 0 < long <= 8192
    assert in_group(1, act)[0] == [0, 0, 0]


def test_spans_without_a_result_are_found() -> None:
    from mdattn_mpi.devices.cuda.partials import complement

    assert complement([Span(2, 4), Span(6, 8)], 9) == [Span(0, 2), Span(4, 6), Span(8, 9)]
    assert complement([Span(0, 9)], 9) == []


def test_an_array_that_begins_between_multiples_of_16_bytes_is_copied() -> None:
    """Kernels load 16 bytes at a time."""
    values = np.arange(33, dtype=np.float16).reshape(33, 1, 1)

    def act(device: CudaDevice) -> NDArray[Any]:
        device._interop.adopt = lambda array: array  # type: ignore[method-assign]
        whole = device.upload(values)
        assert device.adopt(whole) is whole
        shifted = whole[slice(1, None)]
        assert shifted.is_contiguous
        adopted = device.adopt(shifted)
        assert adopted.address % 16 == 0
        return device.download(adopted).wait()[0]

    (found,) = in_group(1, act)
    assert np.array_equal(found, values[1:])
