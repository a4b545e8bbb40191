"""TensorRT lies as it was seen to in the field: every lie is caught before an item is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.ranks import on_ranks
from tests.support.tensorrt import library, needs_tensorrt

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import World

pytestmark = needs_tensorrt

SILENT = "single device", "lost communicator"


def problem(causal: Any = "none", dtype: Any = "bfloat16", tokens: int = 96) -> Any:
    from mdattn_mpi.problem import AttentionProblem

    return AttentionProblem(tokens, tokens, 8, 4, 64, 64, dtype, causal)


def refusal(group: Any, strategy: str, lies: str, one: Any = None, **more: Any) -> Any:
    """What the backend says to an engine that lies; it enqueues nothing but the proof."""
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt_double import DoubleBackend

    backend = DoubleBackend(group, library(), lies=lies, **more)
    with pytest.raises(DeviceError) as caught:
        backend.plan(one or problem(), strategy, lse=False)
    assert backend.tape.names().count("enqueue") <= 1
    assert backend.tape.names().count("download") <= 1
    assert not backend._engines
    assert caught.value.exit_code == 4
    assert "-b cuda" in caught.value.fix
    return caught.value


@on_ranks(2, 3)
def test_collectives_that_do_nothing(world: World) -> None:
    for lies in SILENT:
        for causal in ("none", "upper_left"):
            error = refusal(world, "allgather", lies, problem(causal))
            assert str(library()) in error.what
            assert "allgather on" in error.what
            # Under the mask, what rank 0 sees is its own: others notice.
            assert error.rank == (1 if causal != "none" else 0)
            if causal == "none":
                assert "attention to its own keys only" in error.what
                assert f"{world.size} of {world.size} ranks" in error.what
    if world.size == 2:
        assert "times the tolerance" in refusal(world, "ulysses", "single device").what


@on_ranks(2)
def test_a_ring_that_does_nothing(world: World) -> None:
    error = refusal(world, "ring", "single device", version="11.4.1")
    assert "tensorrt 11.4.1 computes wrong attention by ring on 2 ranks" in error.what
    assert "attention to its own keys only" in error.what


@on_ranks(4)
def test_groups_that_are_ignored(world: World) -> None:
    group = world.split(world.rank // 2)
    kwargs = {"version": "11.2.1.2", "everyone": world.comm}
    if world.rank < 2:  # what is taken for their group is
        from tests.support.tensorrt_double import DoubleBackend

        backend = DoubleBackend(group, library(), lies="groups", **kwargs)
        backend.plan(problem(), "allgather", lse=False)
    else:
        error = refusal(group, "allgather", "groups", **kwargs)
        assert "the keys of another group's ranks, 0 to 1" in error.what
        assert error.rank == 2


@on_ranks(3)
def test_a_handshake_of_one_rank_after_another(world: World) -> None:
    from mdattn_mpi.trt import runtime
    from tests.support.tensorrt_double import DoubleBackend, DoubleRuntime

    class Sequential(DoubleRuntime):
        def _connect(self, engine: Any) -> None:
            error = None
            for rank in range(world.size):
                if rank == world.rank:
                    try:
                        super()._connect(engine)
                    except Exception as caught:
                        error = caught
                world.barrier()
            if error:
                raise error

    class Backend(DoubleBackend):
        runtime_class = Sequential

    from mdattn_mpi.errors import DeviceError

    runtime.HANDSHAKE = 0.5  # type: ignore[misc]
    backend = Backend(world, library())
    with pytest.raises(DeviceError, match="sequential handshake") as caught:
        backend.plan(problem(), "allgather", lse=False)
    assert caught.value.rank == 0
    assert "enqueue" not in backend.tape.names()
    runtime.HANDSHAKE = 120.0  # type: ignore[misc]


@on_ranks(2)
def test_what_the_library_says_is_believed(world: World) -> None:
    words = "The engine is not a multi-device engine. (mIsMdEngine == true failed)"
    from tests.support.tensorrt_double import DoubleBackend

    error = refusal(world, "allgather", "says single device", version="11.0.0.114")
    assert "single-device engine" in error.what
    assert "TensorRT 11.2 or later" in error.fix
    error = refusal(world, "ulysses", "collectives left out")
    assert "the engine lacks 1 ALL_TO_ALL of its network" in error.what

    class Refusing(DoubleBackend):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.tape.refuses, self.tape.words = "communicator", words

    from mdattn_mpi.errors import DeviceError

    backend = Refusing(world, library(), version="11.0.0.114")
    with pytest.raises(DeviceError, match="single-device engine") as caught:
        backend.plan(problem(), "allgather", lse=False)
    assert words in caught.value.what
    assert "4381" in caught.value.what
    assert "enqueue" not in backend.tape.names()


@on_ranks(2)
def test_a_new_context_is_not_used_without_a_communicator(world: World) -> None:
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt_double import DoubleBackend

    backend = DoubleBackend(world, library())
    backend.plan(problem(), "allgather", lse=False)
    (engine,) = backend._engines
    engine._context = engine._engine.create_execution_context()
    enqueued = backend.tape.names().count("enqueue")
    with pytest.raises(DeviceError, match="lost communicator"):
        engine.enqueue(7)
    assert backend.tape.names().count("enqueue") == enqueued


@on_ranks(2)
def test_nothing_written_and_zeros(world: World) -> None:
    error = refusal(world, "allgather", "nothing is written")
    assert "NaN in every row, as if nothing was written" in error.what
    assert "gives zeros (" in refusal(world, "allgather", "zeros").what


@on_ranks(2)
def test_fp16_that_is_summed_in_fp16(world: World) -> None:
    """It is known by version, and cast up where that helps; else the proof says what it sees."""
    from tests.support.tensorrt_double import DoubleBackend

    half = problem(dtype="float16")
    for strategy in ("ring", "allgather", "ulysses"):
        error = refusal(world, strategy, "fp16", half, version="11.2.3")
        assert "rounded as if they were summed in FP16" in error.what
        assert "FP16 accumulation" in error.what
    for version, dtype in (("11.3.0", "float16"), ("11.2.3", "bfloat16")):
        backend = DoubleBackend(world, library(), lies="fp16", version=version)
        plan = backend.plan(problem(dtype=dtype), "allgather", lse=False)
        assert "proven on 96 tokens" in "; ".join(plan.reasons)


@on_ranks(1, 2, 3, 4)
def test_every_engine_is_proven_and_says_what_it_cost(world: World) -> None:
    from mdattn_mpi.errors import RejectedError
    from tests.support.tensorrt_double import DoubleBackend

    backend, proven = DoubleBackend(world, library(), version="11.0.0.114"), 0
    for strategy in ("ring", "allgather", "ulysses"):
        for causal in ("none", "upper_left", "lower_right"):
            for dtype, tokens in (("bfloat16", 97), ("float16", 120)):
                try:
                    plan = backend.plan(problem(causal, dtype, tokens), strategy, lse=False)  # type: ignore[arg-type]
                except RejectedError:  # what the strategy can't do
                    continue
                proven += 1
                assert "proven on" in plan.reasons[-1]
                assert "of the tolerance" in plan.reasons[-1]
    assert backend.tape.names().count("enqueue") == len(backend._engines) > 3
    assert proven >= len(backend._engines)
    assert backend.describe()["proofs"].count("proven on") == len(backend._engines)
    assert backend.timings()["compute"] == 0
    backend.close()
    assert backend.gpu.lent == 0
