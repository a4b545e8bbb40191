"""The tensorrt backend on real ranks, with TensorRT's runtime and the GPU recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.ranks import on_ranks
from tests.support.tensorrt import library, needs_tensorrt

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import World

pytestmark = needs_tensorrt

LENGTHS = (40, 96, 67)


def problems(causal: Any = "none", lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    from mdattn_mpi.problem import AttentionProblem

    return [AttentionProblem(s, s, 8, 2, 16, 16, "bfloat16", causal) for s in lengths]


def item(problem: Any, seed: int) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    shape = (problem.kv_tokens, problem.kv_heads, problem.head_dim)
    q = random.standard_normal((problem.q_tokens, problem.q_heads, problem.head_dim))
    k, v = random.standard_normal(shape), random.standard_normal(shape)
    return tuple(array.astype(ml_dtypes.bfloat16) for array in (q, k, v))  # type: ignore[return-value]


def begin(backend: Any, plan: Any, arrays: Any, rank: int) -> Any:
    q, k, v = arrays
    query, kv = plan.partition.query[rank], plan.partition.kv[rank]
    return backend.begin(plan, q[query[0].slice], k[kv[0].slice], v[kv[0].slice])


@on_ranks(1, 4)
def test_a_batch_is_right_and_calls_are_in_order(world: World) -> None:
    from mdattn_mpi.verifier.reference import reference
    from tests.support.tensorrt_double import POINTER, DoubleBackend

    for causal in ("none", "upper_left"):
        for strategy in ("allgather", "ulysses"):
            backend = DoubleBackend(world, library())
            wanted = problems(causal)
            backend.prepare(wanted, strategy)
            assert len(backend.built) == (1 if world.rank == 0 else 0)
            plans = [backend.plan(problem, strategy, lse=False) for problem in wanted]
            assert len({plan.engine_digest for plan in plans}) == 1
            arrays = [item(problem, seed) for seed, problem in enumerate(wanted)]
            running = begin(backend, plans[0], arrays[0], world.rank)
            for number, plan in enumerate(plans):
                following = None
                if number + 1 < len(plans):
                    following = begin(backend, plans[number + 1], arrays[number + 1], world.rank)
                backend.enqueue(running)
                output, _ = backend.collect(running).wait()
                q, k, v = arrays[number]
                (span,) = plan.partition.query[world.rank]  # type: ignore[union-attr]
                assert output.shape == (len(span), 8, 16)
                rows = np.arange(span.start, span.stop)
                expected = reference(
                    plan.problem,
                    rows,
                    q[rows],
                    lambda name, part, k=k, v=v: {"key": k, "value": v}[name][part.slice],  # type: ignore[misc]
                ).output
                assert np.abs(output.astype(float) - expected).max() < 0.04
                running = following
            backend.close()
            assert backend.gpu.lent == 0
            names = backend.tape.names()
            connect = ["set_communicator"] if world.size > 1 else []
            assert names[: 2 + len(connect)] == ["deserialize", "context", *connect]
            assert names.count("deserialize") == 1
            assert names.count("enqueue") == 4  # the first is the proof
            assert names[-2:] == ["communicator.close", "gpu.close"]
            assert ("enqueue", 7) in backend.tape.calls
            if connect:
                assert ("set_communicator", POINTER) in backend.tape.calls
            first = names.index("enqueue")
            before = names[:first]
            assert before[-1] == "wait for uploads"
            assert before.count("set_tensor_address") in (4, 5)
            assert before.count("set_input_shape") == 3


@on_ranks(2)
def test_what_fails_on_one_rank_fails_on_all_alike(world: World) -> None:
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt_double import DoubleBackend

    words = "The engine cannot run on this GPU, which has compute capability 9.0."
    for refuses, told in (
        ("deserialize", "can't load the engine on a GPU of SM 12.0"),
        ("context", "can't make an execution context"),
        ("communicator", "refused the NCCL communicator"),
    ):
        backend = DoubleBackend(world, library())
        if world.rank == 1:
            backend.tape.refuses, backend.tape.words = refuses, words
        with pytest.raises(DeviceError) as caught:
            backend.prepare(problems(), "allgather")
        assert told in caught.value.what
        assert words in caught.value.what
        assert caught.value.rank == 1
        assert caught.value.exit_code == 4
        assert "-b cuda" in caught.value.fix or "LD_LIBRARY_PATH" in caught.value.fix
        if refuses != "communicator":  # nobody entered the handshake alone
            assert "set_communicator" not in backend.tape.names()
        backend.abort()
        assert backend.tape.names()[-1] == "communicator.abort"


@on_ranks(2)
def test_a_gpu_that_cannot_run_it_is_refused_on_all_ranks(world: World) -> None:
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt_double import DoubleBackend

    backend = DoubleBackend(world, library(), sm=(9, 0))
    if library().flavour == "tensorrt_rtx":
        with pytest.raises(DeviceError, match=r"SM 9.0.*8\.0, 8\.6") as caught:
            backend.plan(problems()[0], "allgather", lse=False)
        assert caught.value.fix.startswith("use -b cuda, or full TensorRT")
    with pytest.raises(DeviceError, match="ring can't run"):
        backend.plan(problems(lengths=(64,))[0], "ring", lse=False)
    assert backend.tape.calls == []


@on_ranks(2)
def test_two_nccl_libraries_are_refused_before_the_handshake(world: World) -> None:
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt_double import DoubleBackend

    for found, told in ((["/a/libnccl.so.2", "/b/libnccl.so.2"], "2 NCCL"), ([], "no NCCL")):
        backend = DoubleBackend(world, library())
        if world.rank == 0:
            backend.nccl[:] = found
        with pytest.raises(DeviceError, match=told) as caught:
            backend.prepare(problems(), "ulysses")
        assert caught.value.rank == 0
        assert "set_communicator" not in backend.tape.names()


@on_ranks(2)
def test_a_failed_build_is_everyones(world: World) -> None:
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt_double import DoubleBackend

    class Broken(DoubleBackend):
        def _builder(self, spec: Any) -> Any:
            def build() -> Any:
                raise DeviceError("TensorRT built no engine: RingAttention unsupported")

            return build

    backend = Broken(world, library())
    with pytest.raises(DeviceError, match="RingAttention unsupported"):
        backend.plan(problems()[0], "allgather", lse=False)
    assert backend.tape.calls == []


@on_ranks(2)
def test_an_engine_file_is_shared_checked_and_held_to(world: World, folder: Any) -> None:
    import json

    from mdattn_mpi.errors import DeviceError, RejectedError
    from mdattn_mpi.trt.choice import spec_for
    from mdattn_mpi.trt.store import describe, write_engine
    from tests.support.tensorrt_double import DoubleBackend

    path = folder / "attn.engine"
    real = library()

    def make(sm: Any = (12, 0), ranks: int = 2) -> None:
        (spec,) = spec_for(problems(), "allgather", ranks)
        engine = json.dumps(spec.facts()).encode()
        if world.rank == 0:
            write_engine(path, engine, describe(engine, real, sm, spec))
        world.barrier()

    make()
    backend = DoubleBackend(world, real, engine=str(path))
    plan = backend.plan(problems()[1], "auto", lse=False)
    assert plan.strategy == "allgather"
    with pytest.raises(RejectedError, match="engine is for"):
        backend.plan(problems(lengths=(4096,))[0], "auto", lse=False)
    with pytest.raises(RejectedError, match="-s ulysses with an engine of allgather"):
        backend.plan(problems()[1], "ulysses", lse=False)

    make(sm=(8, 6))
    with pytest.raises(DeviceError, match=r"for SM 8.6, this GPU has SM 12.0"):
        DoubleBackend(world, real, engine=str(path))
    make(ranks=4)
    with pytest.raises(RejectedError, match="for 4 ranks, this group has 2"):
        DoubleBackend(world, real, engine=str(path))
    make()
    if world.rank == 0:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    world.barrier()
    with pytest.raises(RejectedError, match="SHA-256"):
        DoubleBackend(world, real, engine=str(path))


@on_ranks(2)
def test_ranks_that_choose_other_engines_notice_before_one_is_built(world: World) -> None:
    from mdattn_mpi.errors import DisagreementError, RejectedError
    from tests.support.tensorrt_double import DoubleBackend

    class Choosy(DoubleBackend):
        def _choose(self, problem: Any, strategy: str) -> Any:
            if world.rank == 1:
                raise RejectedError("an older library")
            return super()._choose(problem, strategy)

    backend = Choosy(world, library())
    with pytest.raises(DisagreementError, match="engines"):
        backend.prepare(problems(), "allgather")
    assert not backend.built
    backend.close()
