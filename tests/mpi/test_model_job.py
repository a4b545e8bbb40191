"""`mdattn run --engine --bind` on real ranks: a model's engine from HDF5 to HDF5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

from tests.support.ranks import on_ranks
from tests.support.tensorrt import library, needs_tensorrt

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import World

pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytestmark = needs_tensorrt

LENGTHS = (24, 17, 31)
BIND = ("hidden=items/*/hidden:0", "output=items/*/out")


def prepare(world: World, folder: Path, strategy: Any) -> Any:
    """Write data, engine and manifest on rank 0; return the model."""
    from mdattn_mpi.onnx.shard import shard_model
    from mdattn_mpi.onnx.sharding import read_sharding
    from mdattn_mpi.trt.store import describe_model, write_engine
    from tests.support.onnx_block import HEAD_DIM, HEADS, make_block

    model = make_block(kv_heads=HEADS, causal=True)
    if world.rank == 0:
        sharded, _ = shard_model(model, strategy, world.size, {})
        engine = sharded.SerializeToString()
        sharding = read_sharding(sharded, folder)
        manifest = describe_model(engine, library(), (12, 0), sharding, model="0")
        write_engine(folder / "block.engine", engine, manifest)
        random = np.random.default_rng(1)
        with h5py.File(folder / "data.h5", "w") as file:
            for number, tokens in enumerate(LENGTHS):
                shape = (tokens, 1, HEADS * HEAD_DIM)
                hidden = random.standard_normal(shape).astype(np.float16)
                file[f"items/item{number}/hidden"] = hidden
    world.barrier()
    return model


def run(world: World, folder: Path, bind: tuple[str, ...] = BIND, **options: Any) -> list[str]:
    """Run the job; return what was called on this rank."""
    from mdattn_mpi.runner.jobspec import JobSpec
    from mdattn_mpi.runner.model_job import run_model_job
    from tests.support.tensorrt_double import DoubleRoom

    names = {name: str(folder / f"{name}.h5") for name in ("data", "output")}
    spec = JobSpec(**names, engine=str(folder / "block.engine"), **options)
    rooms: list[DoubleRoom] = []

    def open_here(group: Any) -> DoubleRoom:
        rooms.append(DoubleRoom(group, library()))
        return rooms[0]

    assert run_model_job(spec, bind, world, open_here) == 0
    assert rooms[0].memory.lent == 0
    return rooms[0].tape.names()


@on_ranks(4)
def test_every_item_is_right_and_done_once(world: World, folder: Path) -> None:
    from tests.support.onnx_block import HEADS, evaluate

    for strategy in ("allgather", "ulysses"):
        model = prepare(world, folder, strategy)
        names = run(world, folder, overwrite=True)
        assert names.count("enqueue") == len(LENGTHS)
        assert names.index("set_communicator") < names.index("enqueue")
        with h5py.File(folder / "data.h5") as data, h5py.File(folder / "output.h5") as output:
            for number in range(len(LENGTHS)):
                hidden = data[f"items/item{number}/hidden"][:]
                expected = evaluate(model, hidden, HEADS, causal=True)
                found = output[f"items/item{number}/out"][:].astype(float)
                assert np.abs(found - expected).max() < 0.01
            assert output["ledger/state"][:].tolist() == [1, 1, 1]
        assert run(world, folder).count("enqueue") == 0  # the same command again
    world.barrier()


@on_ranks(2)
def test_what_does_not_fit_is_refused_on_all_ranks(world: World, folder: Path) -> None:
    from mdattn_mpi.errors import RejectedError

    prepare(world, folder, "allgather")
    for bind, options, told in (
        (("hidden=items/*/hiden:0", BIND[1]), {}, "no item has 'hiden'"),
        ((BIND[0],), {}, "'output' of the engine is bound to nothing"),
        (("hiden=items/*/hidden:0", BIND[1]), {}, "no input or output 'hiden'"),
        (BIND, {"items": "nothing*"}, "no item matches"),
    ):
        with pytest.raises(RejectedError, match=told):
            run(world, folder, bind, **options)
    run(world, folder, items="item0")
    with pytest.raises(RejectedError, match="its items are others"):
        run(world, folder)
    with pytest.raises(RejectedError, match="belongs to another job: bindings"):
        run(world, folder, ("hidden=items/*/hidden", "output=items/*/other"), items="item0")
    world.barrier()
    if world.rank == 0:
        with h5py.File(folder / "data.h5", "a") as file:
            del file["items/item1/hidden"]
            file["items/item1/hidden"] = np.zeros((4, 1, 7), np.float16)
    world.barrier()
    with pytest.raises(RejectedError, match="takes float16") as caught:
        run(world, folder, overwrite=True)
    assert caught.value.item == "item1"
