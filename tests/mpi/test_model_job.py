"""`mdattn run --engine --bind` on real ranks: what a job of attention promises, a model's does too.

TensorRT's runtime and the GPU are doubles that compute the real model; everything else is real.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.lockstep import death_note
from tests.support.model_job import BIND, command, expected, prepare
from tests.support.mpirun import kill_all, mark_of, mpirun, start
from tests.support.ranks import on_ranks
from tests.support.storm import done, results
from tests.support.tensorrt import needs_tensorrt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from subprocess import CompletedProcess

    from mdattn_mpi.lockstep.world import World

pytest.importorskip("onnx", reason="the package onnx isn't installed")
pytestmark = needs_tensorrt

LENGTHS = (24, 17, 31, 5, 12)
TOLERANCE = 0.01  # of float16 weights and activations; without the other rank's keys it is ten fold


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and an engine for two ranks, never written to."""
    folder = tmp_path_factory.mktemp("pair")
    prepare(folder, 2, LENGTHS)
    return folder


@pytest.fixture
def folder(pair: Path, tmp_path: Path) -> Path:
    """The same files, and room for an output."""
    for name in ("data.h5", "block.engine", "block.engine.json"):
        shutil.copy(pair / name, tmp_path / name)
    return tmp_path


def run(folder: Path, *options: str, ranks: int = 2, **more: Any) -> CompletedProcess[str]:
    return mpirun(ranks, command(folder, *options, **more))


def errors(folder: Path, items: Sequence[int] = range(5)) -> list[float]:
    """The largest error of each item."""
    with h5py.File(folder / "out.h5") as output:
        return [
            float(np.abs(output[f"items/item{n}/out"][:].astype(float) - expected(folder, n)).max())
            for n in items
        ]


def poison(folder: Path, number: int) -> None:
    """Put a NaN into an item's last token, which the last rank reads."""
    with h5py.File(folder / "data.h5", "r+") as file:
        file[f"items/item{number}/hidden"][-1, 0, 3] = np.nan


def opened(runtime: Any, folder: Path) -> Any:
    """Collective. Load the engine that lies in `folder`."""
    from mdattn_mpi.trt.model import Model

    path = folder / "block.engine"
    return Model(runtime, runtime.share_file(path), str(path))


@on_ranks(2, 3)
def test_an_engine_whose_collectives_do_nothing_is_not_used(world: World, folder: Path) -> None:
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt import library
    from tests.support.tensorrt_double import DoubleRuntime

    if world.rank == 0:
        prepare(folder, world.size, (9,))
    world.barrier()
    for lies in ("single device", ""):
        runtime = DoubleRuntime(world, library())
        runtime.double.tape.lies = lies
        if not lies:
            model = opened(runtime, folder)
            assert "ranks hear of each other" in model._tried
            assert "aren't proven" in model._tried
            continue
        with pytest.raises(DeviceError, match="without its collectives") as caught:
            opened(runtime, folder)
        assert "TensorRT 11.2" in caught.value.fix


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="the extra `fast` isn't installed")
@on_ranks(2, 3)
def test_a_model_is_proven_against_onnx_runtime(world: World, folder: Path) -> None:
    """What is right passes; zeros, own tokens alone, nothing and another model don't."""
    from mdattn_mpi.errors import DeviceError
    from tests.support.tensorrt import library
    from tests.support.tensorrt_double import DoubleRuntime

    if world.rank == 0:
        prepare(folder, world.size, (9,), known=True)
    world.barrier()
    for lies, told in (
        ("", ""),
        ("zeros", "gives zeros"),
        ("single device", "gives what its own tokens alone would make"),
        ("nothing is written", "gives NaN in every row"),
        ("another model", "gives other numbers, 0.2 off"),
    ):
        runtime = DoubleRuntime(world, library())
        runtime.double.tape.lies = lies
        if lies:
            with pytest.raises(DeviceError, match=told) as caught:
                opened(runtime, folder)
            assert "computes the model wrongly (allgather" in str(caught.value)
            assert "mdattn shard -s" in caught.value.fix
        else:
            assert "proven against ONNX Runtime" in opened(runtime, folder)._tried


@pytest.mark.parametrize("written", ["as exported", "sharded"])
def test_an_onnx_file_is_built_kept_and_run(
    written: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of the double is the model itself; all else of `run -b tensorrt` is real."""
    from mdattn_mpi.onnx.shard import shard_model
    from tests.support.model_job import model

    monkeypatch.setenv("MDATTN_CACHE", str(folder / "cache"))
    whole = model() if written == "as exported" else shard_model(model(), "allgather", 2, {})[0]
    (folder / "model.onnx").write_bytes(whole.SerializeToString())
    first = run(folder, model="model.onnx")
    assert first.returncode == 0, first.stderr
    assert max(errors(folder)) < TOLERANCE
    log = (folder / "out.h5.run/rank-0000.log").read_text()
    there = find_spec("onnxruntime") is not None
    assert ("proven against ONNX Runtime" if there else "aren't proven") in " ".join(log.split())
    (kept,) = (folder / "cache").glob("**/*.engine")
    before = kept.stat().st_mtime_ns
    again = run(folder, "--overwrite", model="model.onnx")
    assert again.returncode == 0, again.stderr
    assert max(errors(folder)) < TOLERANCE
    assert kept.stat().st_mtime_ns == before  # it came from the cache
    if written == "sharded":
        refused = run(folder, "--overwrite", "-s", "ulysses", model="model.onnx")
        assert refused.returncode == 2
        assert "sharded for allgather" in " ".join(refused.stderr.split())


def test_every_item_is_right_and_a_finished_job_does_nothing(folder: Path) -> None:
    first = run(folder)
    assert first.returncode == 0, first.stderr
    assert f"{len(LENGTHS)} of {len(LENGTHS)} items done" in first.stderr
    assert "tokens/s" in first.stderr
    assert "FLOP/s" not in first.stderr
    assert max(errors(folder)) < TOLERANCE
    before = (folder / "out.h5").read_bytes()
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert "backend" not in again.stderr  # nothing was opened
    assert (folder / "out.h5").read_bytes() == before
    summary = json.loads((folder / "out.h5.run/summary.json").read_text())
    assert summary["items"]["done_now"] == 0
    assert (folder / "out.h5.run/rank-0000.log").exists()
    assert not (folder / "out.h5.run/rank-0001.log").exists()  # it has nothing to say


def test_tokens_that_change_hands_are_noticed(folder: Path) -> None:
    """The negative control: what a rank computes depends on the tokens of the other one."""
    assert run(folder, "--items", "item2").returncode == 0
    assert errors(folder, [2])[0] < TOLERANCE
    with h5py.File(folder / "data.h5", "r+") as file:
        hidden = file["items/item2/hidden"]
        hidden[0] = -hidden[0]  # the first rank's; the last token attends to it
    assert errors(folder, [2])[0] > 10 * TOLERANCE
    with h5py.File(folder / "out.h5") as output:
        last = output["items/item2/out"][-1].astype(float)
    assert np.abs(last - expected(folder, 2)[-1]).max() > 2 * TOLERANCE


def test_a_dry_run_leaves_no_trace(folder: Path) -> None:
    there = sorted(folder.iterdir())
    found = run(folder, "--dry-run")
    assert found.returncode == 0, found.stderr
    assert "24 tokens, giving out float16 [24, 1, 128]" in " ".join(found.stderr.split())
    assert sorted(folder.iterdir()) == there


def test_one_bad_item_fails_alone(folder: Path) -> None:
    poison(folder, 1)
    found = run(folder)
    assert found.returncode == 1, found.stderr
    for word in ("item1", "hidden holds nan within tokens 9 to 17", "rank 1", "--nonfinite pass"):
        assert word in " ".join(found.stderr.split()), found.stderr
    with h5py.File(folder / "out.h5") as file:
        assert file["ledger/state"][...].tolist() == [1, 2, 1, 1, 1]
    assert max(errors(folder, [0, 2, 3, 4])) < TOLERANCE
    passed = run(folder, "--nonfinite", "pass")
    assert passed.returncode == 0, passed.stderr


def test_a_killed_job_is_resumed(folder: Path) -> None:
    assert run(folder).returncode == 0
    whole = results(folder / "out.h5")
    shutil.rmtree(folder / "out.h5.run")
    (folder / "out.h5").unlink()
    killed = run(folder, "--chaos", "kill@enqueue:item4:1")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    note = death_note.read(f"{folder / 'out.h5'}.run")
    assert note is not None
    assert "rank 1" in death_note.message(note)
    left = done(folder / "out.h5")
    assert left < len(LENGTHS)
    resumed = run(folder, "--json")
    assert resumed.returncode == 0, resumed.stderr
    items = json.loads(resumed.stdout)["items"]
    assert (items["done_before"], items["done_now"]) == (left, len(LENGTHS) - left)
    assert results(folder / "out.h5") == whole


def test_a_signal_lets_it_finish_what_is_in_hand(tmp_path: Path) -> None:
    folder, count = tmp_path, 14
    prepare(folder, 2, range(9, 9 + count))
    process = start(2, command(folder, "--chaos", "slow@enqueue::1"))
    try:
        for _ in range(600):
            time.sleep(0.1)
            if done(folder / "out.h5") >= 1:
                break
        os.kill(process.pid, signal.SIGUSR1)  # mpirun passes it on
        _, err = process.communicate(timeout=60)
    finally:
        kill_all(mark_of(process))
    assert process.returncode == 75, err
    assert 0 < done(folder / "out.h5") < count
    assert "run the same command again" in err
    assert run(folder).returncode == 0
    assert max(errors(folder, range(count))) < TOLERANCE


def test_a_time_limit_stops_it(folder: Path) -> None:
    found = run(folder, "--max-time", "0.001")
    assert found.returncode == 75, found.stderr
    assert run(folder).returncode == 0


def test_groups_of_one_and_of_two_ranks(folder: Path, tmp_path: Path) -> None:
    grouped = run(folder, "--group-size", "2", ranks=4)
    assert grouped.returncode == 0, grouped.stderr
    assert max(errors(folder)) < TOLERANCE
    pairs = results(folder / "out.h5")
    assert run(folder, "--overwrite", "--group-size", "all").returncode == 0
    assert results(folder / "out.h5") == pairs
    alone = tmp_path / "alone"
    alone.mkdir()
    prepare(alone, 1, LENGTHS)
    each = run(alone, "--group-size", "1", ranks=2)
    assert each.returncode == 0, each.stderr
    assert max(errors(alone)) < TOLERANCE
    refused = run(folder, "--overwrite", "--group-size", "1")
    assert refused.returncode == 2
    assert "the engine is for 2 ranks, this group has 1" in " ".join(refused.stderr.split())


def test_other_commands_know_the_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder).returncode == 0
    out = str(folder / "out.h5")
    assert main(["inspect", out, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "out float16 [24, 1, 128]" in shown
    assert f"0 of {len(LENGTHS)} items damaged" in shown
    assert main(["status", out]) == 0
    assert f"{len(LENGTHS)} of {len(LENGTHS)} items done" in capsys.readouterr().out
    assert main(["verify", out, "--data", str(folder / "data.h5")]) == 2
    assert "engines can't be verified" in " ".join(capsys.readouterr().err.split())
    with h5py.File(out, "r+") as file:
        file["items/item2/out"][-1, 0, 5] += 1
    assert main(["inspect", out, "--check"]) == 1
    assert "item2: the shard of rank 1" in capsys.readouterr().out


@on_ranks(2)
def test_what_does_not_fit_is_refused_on_all_ranks(world: World, folder: Path) -> None:
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.runner import model
    from mdattn_mpi.runner.jobspec import JobSpec
    from mdattn_mpi.runner.opening import open_job
    from tests.support.tensorrt import library
    from tests.support.tensorrt_double import DoubleRuntime, ModelEngine

    model.open_runtime = lambda group: DoubleRuntime(group, library())
    if world.rank == 0:
        prepare(folder, 2, LENGTHS)
    world.barrier()

    files = {"data": str(folder / "data.h5"), "output": str(folder / "out.h5")}

    def refused(told: str, bind: tuple[str, ...] = BIND, **options: Any) -> RejectedError:
        spec = JobSpec(**files, engine=str(folder / "block.engine"), bind=bind, **options)
        with pytest.raises(RejectedError, match=told) as caught:
            open_job(spec, world)
        assert caught.value.fix
        return caught.value

    refused("no item has 'hiden'", ("hidden=items/*/hiden:0", BIND[1]))
    refused("'output' of the engine is bound to nothing", (BIND[0],))
    refused("no input or output 'hiden'", ("hiden=items/*/hidden:0", BIND[1]))
    refused("no item matches", items="nothing*")
    refused("--lse", lse=True)
    refused("-b cpu", backend="cpu")
    refused("--group-size auto", group_size="auto")
    ModelEngine.longest = 15  # of 31 tokens the first rank gets 16
    error = refused("31 tokens are 16 a rank; the engine takes 1 to 15 a rank in 'hidden'")
    assert error.item == "item2"
    ModelEngine.longest = 16
    open_job(JobSpec(**files, engine=str(folder / "block.engine"), bind=BIND), world)
    world.barrier()
    if world.rank == 0:
        with h5py.File(folder / "data.h5", "a") as file:
            del file["items/item1/hidden"]
            file["items/item1/hidden"] = np.zeros((4, 1, 7), np.float16)
    world.barrier()
    assert refused(r"want float16 \[tokens, 1, 128\]").item == "item1"
