"""A finished job is known by its files, and no more once one of them was touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mdattn_mpi.dataset import open_dataset, open_output
from mdattn_mpi.dataset.seen import look
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.runner.finished import NAME, finished_before, remember, sources_of
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.trt.store import known_path, manifest_path
from tests.support.finished import Files, finished

PROBLEM = AttentionProblem(37, 23, 2, 1, 16, 8)


class Alone:
    """A world of one rank, or the first of several."""

    rank, world_rank = 0, 0
    board = SimpleNamespace(enter=lambda phase: None)

    def __init__(self, size: int = 2) -> None:
        self.size = size

    def agree(self, step: Any, *, error: Exception | None) -> None:
        if error:
            raise error

    def bcast_bytes(self, data: bytes) -> bytes:
        return data


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A finished job of three items, and what it left in its run folder."""
    made = finished(tmp_path, {f"item{n}": PROBLEM for n in range(3)})
    Path(f"{made.output}.run").mkdir()
    keep(made)
    return made


def spec_of(files: Files, **options: Any) -> JobSpec:
    return JobSpec(str(files.data), str(files.output), **options)


def keep(files: Files, seen: Any = None, **options: Any) -> None:
    """End a job, which has seen its model as it is now, or as it was when it began."""
    with open_dataset(files.data) as dataset, open_output(files.output) as output:
        job = SimpleNamespace(
            spec=spec_of(files, **options),
            world=Alone(),
            dataset=dataset,
            output=output,
            items=dataset.items,
            sources=seen or sources_of(spec_of(files, **options)),
        )
        remember(cast(Any, job), {"items": {"all": 3}})


def known(files: Files, size: int = 2, **options: Any) -> bool:
    summary = finished_before(spec_of(files, **options), cast(Any, Alone(size)))
    assert summary in (None, {"items": {"all": 3}})
    return summary is not None


def record(files: Files) -> Path:
    return Path(f"{files.output}.run") / NAME


def overwrite(path: Path, at: int, data: bytes) -> None:
    """Write in the middle of a file, and set the time of modification back."""
    about = path.stat()
    with path.open("rb+") as file:
        file.seek(at)
        assert file.read(len(data)) != data
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)


def test_the_same_command_again_has_nothing_to_do(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known(files)
    assert known(files, quiet=True, deadline=7.0, max_time=9.0, commit_every=1.0, json=True)
    monkeypatch.chdir(files.data.parent)
    assert known(files._replace(data=Path(files.data.name)))


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ring"},
        {"items": "item1"},
        {"lse": True},
        {"redo": "item1"},
        {"overwrite": True},
        {"size": 3},
    ],
)
def test_another_command_looks_for_itself(files: Files, options: dict[str, Any]) -> None:
    assert not known(files, **options)


def test_a_dataset_that_was_changed_behind_its_times_is_noticed(files: Files) -> None:
    with open_dataset(files.data) as dataset:
        region = dataset.tensor(dataset.items[1], "value").region
        assert region is not None
    overwrite(files.data, region.offset + 8, b"\x55\x2a")
    assert not known(files)


def test_so_is_one_whose_file_system_keeps_no_times_by_its_fingerprint(files: Files) -> None:
    before = look(str(files.data))
    overwrite(files.data, 5000, b"\x55\x2a\x55\x2a")
    after = look(str(files.data))
    assert after._replace(modified=before.modified, changed=before.changed) != before


def test_so_is_an_output_that_was_changed(files: Files) -> None:
    with open_output(files.output, writable=True) as output:
        output.ledger.reopen(output.items[2])
    assert not known(files)


def test_an_item_that_is_not_done_is_never_remembered(files: Files) -> None:
    record(files).unlink()
    with open_output(files.output, writable=True) as output:
        output.ledger.reopen(output.items[2])
    keep(files)
    assert not record(files).exists()
    assert not known(files)


def test_a_dataset_that_leads_to_other_files_is_never_remembered(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(files).unlink()
    monkeypatch.setattr("mdattn_mpi.dataset.hdf5.File.seen", None)
    keep(files)
    assert not record(files).exists()


def transformer(folder: Path) -> dict[str, str]:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(os.urandom(50000))
    return {"model": str(folder), "give": "embedding"}


def onnx_model(folder: Path) -> dict[str, str]:
    """A model whose weights lie in a file of their own."""
    onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
    weights = onnx.numpy_helper.from_array(np.random.default_rng().random((99, 99)), "weights")
    node = onnx.helper.make_node("Identity", ["weights"], ["out"])
    value = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.DOUBLE, [99, 99])
    graph = onnx.helper.make_graph([node], "graph", [], [value], [weights])
    path, outside = folder / "model.onnx", {"location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.helper.make_model(graph), str(path), save_as_external_data=True, **outside)
    return {"model": str(path)}


def engine(folder: Path) -> dict[str, Any]:
    path = folder / "model.engine"
    for file in (path, manifest_path(path), known_path(path)):
        file.write_bytes(os.urandom(50000))
    return {"engine": str(path), "bind": ("hidden=items/*/hidden:0",)}


@pytest.fixture(params=[transformer, onnx_model, engine])
def modelled(
    files: Files, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], list[Path]]:
    """Options that name a model, and all its files; the same job was finished with it."""
    folder = tmp_path / "model"
    folder.mkdir()
    options = request.param(folder)
    keep(files, **options)
    return options, sorted(folder.iterdir())


def test_so_is_a_job_with_a_model(
    files: Files, modelled: tuple[dict[str, Any], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, parts = modelled
    assert len(parts) > 1
    assert known(files, **options)
    monkeypatch.chdir(parts[0].parent)
    for name in {"model", "engine"} & {*options}:
        assert known(files, **{**options, name: os.path.relpath(options[name])})
    assert not known(files)


def test_a_model_of_which_any_file_was_changed_is_noticed(
    files: Files, modelled: tuple[dict[str, Any], list[Path]]
) -> None:
    options, parts = modelled
    for part in parts:
        before = part.read_bytes()
        overwrite(part, len(before) // 2, b"\x55\x2a\x55\x2a")
        assert not known(files, **options), part
        part.write_bytes(before)
        keep(files, **options)
        assert known(files, **options)


def test_so_is_one_whose_file_is_another_one_now(
    files: Files, modelled: tuple[dict[str, Any], list[Path]]
) -> None:
    options, parts = modelled
    for part in parts:
        moved = part.rename(part.with_name("before"))
        assert not known(files, **options), part
        part.symlink_to(moved)
        assert not known(files, **options), part
        part.unlink()
        moved.rename(part)
        keep(files, **options)


def test_so_is_one_that_was_changed_while_the_job_ran(
    files: Files, modelled: tuple[dict[str, Any], list[Path]]
) -> None:
    options, parts = modelled
    seen = sources_of(spec_of(files, **options))
    overwrite(parts[-1], 100, b"\x55\x2a\x55\x2a")
    keep(files, seen, **options)
    assert not known(files, **options)


def test_another_model_is_noticed(
    files: Files, modelled: tuple[dict[str, Any], list[Path]], tmp_path: Path
) -> None:
    options, parts = modelled
    other = tmp_path / "other"
    other.mkdir()
    for part in parts:
        (other / part.name).write_bytes(part.read_bytes())
    before = str(parts[0].parent)
    renamed = {
        name: value.replace(before, str(other)) if isinstance(value, str) else value
        for name, value in options.items()
    }
    assert renamed != options
    assert not known(files, **renamed)


def test_so_is_a_file_that_was_added_to_a_folder(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    options = transformer(folder)
    keep(files, **options)
    (folder / "adapter_config.json").write_text("{}")  # Transformers would take it
    assert not known(files, **options)


def test_a_model_that_can_not_be_looked_at_is_never_remembered(
    files: Files, tmp_path: Path
) -> None:
    record(files).unlink()
    assert sources_of(spec_of(files, model=str(tmp_path / "none.onnx"))) is None
    keep(files, model=str(tmp_path / "none.onnx"))
    assert not record(files).exists()


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _other_count(text: str) -> str:
    return text.replace('"all": 3', '"all": 4')


def _other_ledger(text: str) -> str:
    found = json.loads(text)
    return json.dumps({**found, "ledger": found["ledger"][:1]})


def _nothing(text: str) -> str:
    return "[]"


@pytest.mark.parametrize("damage", [_cut, _other_count, _other_ledger, _nothing])
def test_a_damaged_record_is_not_believed(files: Files, damage: Callable[[str], str]) -> None:
    text = record(files).read_text()
    assert damage(text) != text
    record(files).write_text(damage(text))
    assert not known(files)


def test_a_record_of_another_output_is_not_believed(files: Files, tmp_path: Path) -> None:
    moved = tmp_path / "moved.h5"
    moved.write_bytes(files.output.read_bytes())
    Path(f"{files.output}.run").rename(f"{moved}.run")
    assert not known(files._replace(output=moved))
