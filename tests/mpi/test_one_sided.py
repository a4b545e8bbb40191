"""What fails on one rank of two, beside something collective: both ranks raise it, and go on.

Where that isn't so, one rank waits for ever for the other, and mpirun is killed after a while.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.ranks import on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from mdattn_mpi.errors import MdattnError
    from mdattn_mpi.lockstep.world import World
    from mdattn_mpi.runner.jobspec import JobSpec


def failing(world: World, rank: int, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that raises on `rank` alone."""

    def function(*arguments: Any, **options: Any) -> Any:
        if world.rank == rank:
            raise ImportError("only here")
        return otherwise(*arguments, **options)

    return function


def raised_by_all(
    world: World, call: Callable[[], object], rank: int, match: str = "only here"
) -> MdattnError:
    """Make sure that both ranks raise the error of `rank`, and still understand each other."""
    from mdattn_mpi.errors import MdattnError

    with pytest.raises(MdattnError, match=match) as caught:
        call()
    assert caught.value.agreed
    assert caught.value.rank == rank
    assert world.allgather(world.rank) == [0, 1]
    return caught.value


def small_job(world: World, folder: Path, **options: Any) -> JobSpec:
    """Describe a job on a dataset of two items."""
    from mdattn_mpi.cli import main
    from mdattn_mpi.runner.jobspec import JobSpec

    data = folder / "data.h5"
    if world.rank == 0:
        words = f"make-data {data} --items 2 --length 30 --head-dim 16"
        assert main(words.split()) == 0
    world.barrier()
    return JobSpec(str(data), str(folder / "out.h5"), **{"backend": "cpu", **options})


@on_ranks(2)
def test_a_backend_that_one_rank_cannot_import(world: World) -> None:
    from mdattn_mpi import backends

    for name in ("cuda", "tensorrt"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, f"_import_{name}", failing(world, 1, lambda: None))
            raised_by_all(world, lambda name=name: backends.open_backend(name, world), rank=1)


@on_ranks(2)
def test_a_look_for_gpus_that_fails_on_one_rank(world: World) -> None:
    from mdattn_mpi.backends import backend_name
    from mdattn_mpi.devices import presence

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presence, "why_no_cuda", failing(world, 1, lambda: ""))
        raised_by_all(world, lambda: backend_name("auto", world), rank=1)


@on_ranks(2)
def test_memory_that_one_rank_cannot_tell(world: World, folder: Path) -> None:
    from mdattn_mpi.runner import attention
    from mdattn_mpi.runner.opening import open_job

    spec = small_job(world, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "memory_of_a_rank", failing(world, 1, lambda *_: 1 << 40))
        raised_by_all(world, lambda: open_job(spec, world), rank=1)


@on_ranks(2)
def test_one_group_of_two_that_cannot_open_its_backend(world: World, folder: Path) -> None:
    from mdattn_mpi.runner import attention
    from mdattn_mpi.runner.opening import open_job

    spec = small_job(world, folder, group_size="1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "open_backend", failing(world, 0, attention.open_backend))
        raised_by_all(world, lambda: open_job(spec, world), rank=0)


@on_ranks(2)
def test_one_group_of_two_that_cannot_plan(world: World, folder: Path) -> None:
    from mdattn_mpi.backends import StrategyBackend
    from mdattn_mpi.runner.opening import open_job

    spec = small_job(world, folder, group_size="1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StrategyBackend, "plan", failing(world, 1, StrategyBackend.plan))
        raised_by_all(world, lambda: open_job(spec, world), rank=1)


@on_ranks(2)
def test_a_summary_that_cannot_be_written(world: World, folder: Path) -> None:
    from mdattn_mpi.runner.main import run_job

    spec = small_job(world, folder)
    if world.rank == 0:
        Path(f"{spec.output}.run/summary.json").mkdir(parents=True)  # nothing can take its place
    world.barrier()
    error = raised_by_all(world, lambda: run_job(lambda: spec, world), 0, "summary can't be")
    assert error.exit_code == 1
    assert "summary.json" in error.file


@on_ranks(2)
def test_the_traceback_of_a_bug_while_opening_is_in_the_log(world: World, folder: Path) -> None:
    from mdattn_mpi.errors import InternalError, RejectedError
    from mdattn_mpi.lockstep import together
    from mdattn_mpi.runner import opening
    from mdattn_mpi.runner.main import run_job

    def opens_with(error: Exception) -> MdattnError:
        def fail() -> None:
            if world.rank == 1:
                raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opening, "open_attention", lambda *_: together(world, "dataset", fail))
            return raised_by_all(world, lambda: run_job(lambda: spec, world), 1, "chaos")

    spec = small_job(world, folder)
    run = Path(f"{spec.output}.run")
    assert isinstance(opens_with(RejectedError("chaos")), RejectedError)
    world.barrier()
    assert not run.exists()
    world.barrier()
    assert isinstance(opens_with(IndexError("chaos")), InternalError)
    log = (run / "rank-0001.log").read_text()
    assert "Traceback" in log
    assert "IndexError: chaos" in log
