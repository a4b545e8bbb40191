"""The whole job under a real mpirun: bytes, resume, and every kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import h5py
import numpy as np
import pytest

from mdattn_mpi.cli import main
from tests.support.mpirun import mpirun

STRATEGIES = ("ring", "allgather", "ulysses")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five causal items of odd lengths, so short that some ranks get few tokens."""
    path = tmp_path_factory.mktemp("data") / "data.h5"
    options = "--items 5 --lengths 3:170 --q-heads 6 --kv-heads 2 --head-dim 24 --causal --seed"
    assert (
        main(["make-data", str(path), *options.split(), str(np.random.SeedSequence().entropy)[:9]])
        == 0
    )
    return path


def run(ranks: int, *arguments: str | Path, timeout: float = 90.0) -> CompletedProcess[str]:
    return mpirun(ranks, ["-m", "mdattn_mpi", "run", *map(str, arguments)], timeout=timeout)


def results(path: Path) -> dict[str, bytes]:
    """The raw bytes of every output dataset."""
    found: dict[str, bytes] = {}
    with h5py.File(path) as file, path.open("rb") as raw:
        for name, item in file["items"].items():
            for kind, dataset in item.items():
                raw.seek(dataset.id.get_offset())
                found[f"{name}/{kind}"] = raw.read(dataset.id.get_storage_size())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_strategy_is_right_and_gives_the_same_bytes_again(
    ranks: int, data: Path, tmp_path: Path
) -> None:
    for strategy in STRATEGIES:
        out = tmp_path / f"{strategy}.h5"
        done = run(ranks, data, "-o", out, "-s", strategy, "--lse", "--threads", "1")
        assert done.returncode == 0, done.stderr
        assert main(["verify", str(out), "--data", str(data), "--all"]) == 0
    again = tmp_path / "again.h5"
    assert run(ranks, data, "-o", again, "-s", "ulysses", "--lse", "--threads", "2").returncode == 0
    assert results(again) == results(tmp_path / "ulysses.h5")


def test_a_resumed_job_does_only_what_is_not_done(data: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.h5", tmp_path / "whole.h5"
    assert run(2, data, "-o", whole, "-s", "ring").returncode == 0
    first = run(2, data, "-o", out, "-s", "ring", "--chaos", "kill@enqueue:item3:1")
    assert first.returncode != 0
    assert "rank 1" in first.stderr
    with h5py.File(out) as file:
        done = int((file["ledger/state"][...] == 1).sum())
    assert done < 5
    second = run(2, data, "-o", out, "-s", "ring", "--json")
    assert second.returncode == 0, second.stderr
    summary = json.loads(second.stdout)
    assert summary["items"]["done_before"] == done
    assert summary["items"]["done_now"] == 5 - done
    assert results(out) == results(whole)


def test_a_finished_job_does_nothing(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    assert run(2, data, "-o", out).returncode == 0
    before = out.read_bytes()
    assert run(2, data, "-o", out).returncode == 0
    assert out.read_bytes() == before
    assert (
        json.loads((tmp_path / "out.h5.run" / "summary.json").read_text())["items"]["done_now"] == 0
    )


def test_the_plan_says_shapes_as_they_were_understood(tmp_path: Path) -> None:
    options = "--items 1 --length 8 --q-heads 130 --kv-heads 130 --head-dim 4 --quiet"
    assert main(["make-data", str(tmp_path / "d.h5"), *options.split()]) == 0
    for layout, shape in (
        ("token_major", "8 tokens, 130 heads of 4, bfloat16, token-major"),
        ("head_major", "130 tokens, 8 heads of 4, bfloat16, head-major"),
    ):
        done = run(1, tmp_path / "d.h5", "-o", tmp_path / "o.h5", "--dry-run", "--layout", layout)
        said = " ".join(done.stderr.split())
        assert shape in said
        assert ("has more heads than tokens" in said) == (layout == "token_major")


def test_quiet_and_verbose(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    quiet = run(2, data, "-o", out, "--items", "item1", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    verbose = run(2, data, "-o", out, "--items", "item1", "-v", "--overwrite")
    assert verbose.returncode == 0, verbose.stderr
    assert "mdattn: item item1 done" in verbose.stderr
    refused(run(2, data, "-o", out, "-q", "-v"), 2, "both quiet and verbose")
    copy = Path(shutil.copy(data, tmp_path / "bad.h5"))
    poison(copy, "item1", (0, 0, 0), 0x7FC0)
    failing = run(2, copy, "-o", tmp_path / "bad-out.h5", "-q")
    assert failing.returncode == 1
    assert "item1" in failing.stderr


def test_one_damaged_item_is_computed_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    command = (data, "-o", out, "-s", "ring", "--items", "item[0-2]")
    assert run(2, *command).returncode == 0
    right = out.read_bytes()
    with h5py.File(out) as file:
        output = file["items/item1/output"]
        offset, size = output.id.get_offset(), output.size * 2
    with out.open("r+b") as raw:
        raw.seek(offset + size - 2)
        raw.write(b"??")
    assert main(["verify", str(out)]) == 1
    redo = (data, "-o", out, "-s", "ring", "--redo")
    refused(run(2, *redo), 2, "--redo without --items")
    refused(run(2, *redo, "--items", "item9"), 2, "no item matches")
    refused(run(2, *redo, "--items", "item1", "--overwrite"), 2, "both redo and overwrite")
    refused(
        run(2, data, "-o", out, "-s", "ulysses", "--redo", "--items", "item1"), 2, "another job"
    )
    assert main(["verify", str(out)]) == 1
    again = run(2, *redo, "--items", "item1")
    assert again.returncode == 0, again.stderr
    assert "3 of 3 items done, 1 of them now" in again.stderr
    assert main(["verify", str(out)]) == 0
    assert out.read_bytes() == right


def test_dry_run_leaves_no_trace(data: Path, tmp_path: Path) -> None:
    done = run(2, data, "-o", tmp_path / "out.h5", "--dry-run")
    assert done.returncode == 0
    assert "allgather" in done.stderr
    assert "out.h5 will take" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
    refused(run(1, data, "-o", tmp_path / "none/out.h5", "--dry-run"), 2, "doesn't exist")
    out = tmp_path / "out.h5"
    assert run(1, data, "-o", out, "--items", "item1", "-q").returncode == 0
    before = out.read_bytes()
    refused(run(1, data, "-o", out, "--dry-run"), 2, "belongs to another job")
    again = run(1, data, "-o", out, "--items", "item1", "--dry-run")
    assert "0 of 1 item left to do" in again.stderr
    assert out.read_bytes() == before


def test_some_items_from_a_job_file(data: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(f'data = "{data}"\noutput = "out.h5"\nitems = "item1,item3"\nlse = true\n')
    assert run(2, "--job", job, "-s", "ring").returncode == 0
    assert {name.split("/")[0] for name in results(tmp_path / "out.h5")} == {"item1", "item3"}


def refused(done: CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.count("mdattn: error:") == 1, done.stderr
    said = " ".join(done.stderr.split())
    for word in (*words, "Fix:"):
        assert word in said, done.stderr


def edited(data: Path, folder: Path, edit: str) -> Path:
    """A copy of the dataset with one thing wrong."""
    path = folder / f"{edit}.h5"
    shutil.copy(data, path)
    if edit == "truncated":
        os.truncate(path, path.stat().st_size // 2)
        return path
    if edit == "text":
        path.write_text("query,key,value\n")
        return path
    with h5py.File(path, "r+") as file:
        item = file["items/item2"]
        if edit == "format":
            file.attrs["format"] = "something"
        elif edit == "version":
            file.attrs["version"] = 99
        elif edit == "missing":
            del item["key"]
        elif edit == "shapes":
            del item["key"]
            item.create_dataset("key", data=np.zeros((5, 2, 24), np.float16))
        elif edit == "dtype":
            del item["query"]
            item.create_dataset("query", data=np.zeros((9, 6, 24), np.float32))
        elif edit == "empty":
            for name in ("query", "key", "value"):
                del item[name]
                item.create_dataset(name, shape=(0, 2, 24), dtype=np.float16)
        elif edit == "heads":
            for name, heads in (("query", 5), ("key", 2), ("value", 2)):
                del item[name]
                item.create_dataset(name, data=np.ones((9, heads, 24), np.float16))
    return path


BAD_FILES = {
    "truncated": ("truncated.h5",),
    "text": ("text.h5", "HDF5"),
    "format": ("format",),
    "version": ("version",),
    "missing": ("item2", "key"),
    "shapes": ("item2",),
    "dtype": ("item2", "4 bytes"),
    "empty": ("item2", "0"),
    "heads": ("item2", "5", "2"),
}


@pytest.mark.parametrize("edit", BAD_FILES)
def test_bad_datasets_are_refused_by_all_ranks_together(
    edit: str, data: Path, tmp_path: Path
) -> None:
    path = edited(data, tmp_path, edit)
    refused(run(2, path, "-o", tmp_path / "out.h5"), 2, path.name, *BAD_FILES[edit])
    assert not (tmp_path / "out.h5").exists()


def poison(path: Path, item: str, at: Sequence[int], bits: int) -> None:
    """Overwrite one number of an item's value."""
    with h5py.File(path) as file:
        value = file[f"items/{item}/value"]
        offset = value.id.get_offset() + 2 * int(np.ravel_multi_index(tuple(at), value.shape))
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(bits.to_bytes(2, "little"))


def test_an_item_with_nan_fails_and_the_others_are_done(data: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "nan.h5", tmp_path / "out.h5"
    shutil.copy(data, path)
    with h5py.File(path) as file:
        tokens = file["items/item2/value"].shape[0]
    poison(path, "item2", (tokens - 1, 1, 7), 0x7FC0)
    done = run(2, path, "-o", out, "-s", "allgather")
    assert done.returncode == 1, done.stderr
    for word in ("item2", "nan", f"token {tokens - 1}", "rank 1", "--nonfinite"):
        assert word in " ".join(done.stderr.split()), done.stderr
    with h5py.File(out) as file:
        assert file["ledger/state"][...].tolist() == [1, 1, 2, 1, 1]
    passed = run(2, path, "-o", out, "-s", "allgather", "--nonfinite", "pass")
    assert passed.returncode == 0, passed.stderr


def test_another_job_is_not_resumed_by_accident(data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out.h5", tmp_path / "other.h5"
    assert run(2, data, "-o", out, "-s", "ring").returncode == 0
    before = results(out)
    refused(run(2, data, "-o", out, "-s", "ulysses"), 2, "strategy", "ulysses", "--allow-change")
    refused(run(3, data, "-o", out, "-s", "ring"), 2, "ranks", "3", "--allow-change")
    shutil.copy(data, other)
    poison(other, "item4", (0, 0, 0), 0x3F80)
    refused(run(2, other, "-o", out, "-s", "ring"), 2, "input")
    assert results(out) == before
    assert run(3, data, "-o", out, "-s", "ulysses", "--allow-change").returncode == 0
    assert run(2, other, "-o", out, "-s", "ring", "--overwrite").returncode == 0


def test_places_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    refused(run(2, data, "-o", tmp_path / "none" / "out.h5"), 2, "none")
    refused(run(2, tmp_path / "absent.h5", "-o", tmp_path / "out.h5"), 2, "absent.h5")
    refused(run(2, data, "-o", data), 2, "data.h5")


def test_a_rank_that_sees_another_file(data: Path, tmp_path: Path) -> None:
    """The relative path leads each rank into a folder of its own."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        shutil.copy(data, tmp_path / str(rank) / "data.h5")
    poison(tmp_path / "1" / "data.h5", "item0", (0, 0, 0), 0x4000)
    code = (
        "import os, sys; os.chdir(os.environ['OMPI_COMM_WORLD_RANK']);"
        "from mdattn_mpi.cli import main; sys.exit(main(['run', 'data.h5', '-o', '../out.h5']))"
    )
    done = mpirun(2, ["-c", code], cwd=tmp_path)
    refused(done, 3, "digest", "rank 0", "rank 1")


def test_ranks_that_the_launcher_left_alone(data: Path, tmp_path: Path) -> None:
    """A singleton MPI that is told it is one of two: what mismatched libraries look like."""
    strip = (
        "import os, sys;"
        "keep = {k: os.environ[k] for k in os.environ if k.startswith('OMPI_COMM')};"
        "[os.environ.pop(k) for k in list(os.environ) if k.startswith(('PMIX', 'PRTE', 'OMPI'))];"
        "os.environ.update(keep, OMPI_ALLOW_RUN_AS_ROOT='1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM='1');"
        f"os.execv(sys.executable, [sys.executable, '-m', 'mdattn_mpi', 'run', {str(data)!r},"
        f" '-o', {str(tmp_path / 'out.h5')!r}])"
    )
    done = mpirun(2, ["-c", strip])
    refused(done, 2, "2 processes", "world of 1")
    assert not (tmp_path / "out.h5").exists()


def test_what_the_format_does_not_know(data: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "d.h5", tmp_path / "out.h5"
    shutil.copy(data, copy)
    with h5py.File(copy, "a") as file:
        file["items/item2"].attrs["alibi"] = 64
    refused(run(2, copy, "-o", out), 2, "item2", "attribute alibi", "--ignore alibi")
    assert not out.exists()
    done = run(2, copy, "-o", out, "--ignore", "alibi")
    assert done.returncode == 0, done.stderr
    assert main(["verify", str(out), "--data", str(copy)]) == 0  # the output remembers
    with h5py.File(copy, "a") as file:
        file["items/item2"].attrs["dropout"] = 64
    assert main(["verify", str(out), "--data", str(copy)]) == 2
    assert main(["verify", str(out), "--data", str(copy), "--ignore", "dropout"]) == 0
    refused(run(2, copy, "-o", out, "--ignore", "alibi,dropout"), 2, "belongs to another job")


def test_a_folder_whose_name_is_no_text(data: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    shutil.copy(data, folder / "d.h5")
    out = folder / "out.h5"
    lost = run(2, folder / "d.h5", "-o", out, "--chaos", "kill@enqueue:item3:1")
    assert lost.returncode == 75, lost.stderr
    note = (folder / "out.h5.run" / "death-note.txt").read_bytes()
    assert b"caf\xe9/out.h5" in note
    done = run(2, folder / "d.h5", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["output"] == str(out)
    assert json.loads((folder / "out.h5.run" / "summary.json").read_text())["exit_code"] == 0
    assert main(["verify", str(out), "--data", str(folder / "d.h5")]) == 0
    missing = run(2, folder / "none.h5", "-o", out)
    refused(missing, 2, "none.h5", "No such file")


def read_only(folder: Path, *arguments: str | Path) -> CompletedProcess[str]:
    """Run one rank with `folder` on a file system where nothing can be written."""
    mount = f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}"'
    command = [sys.executable, "-m", "mdattn_mpi", "run", *map(str, arguments)]
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="nothing can be mounted here",
)
def test_a_read_only_file_system(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    assert run(1, data, "-o", out, "--items", "item0").returncode == 0
    again = read_only(tmp_path, data, "-o", out, "--items", "item0")
    assert again.returncode == 0, again.stderr
    assert "nothing is left to do" in again.stderr
    new = ("can't be made", "Read-only file system", "write to another filesystem")
    refused(read_only(tmp_path, data, "-o", tmp_path / "new.h5"), 2, *new)
    refused(read_only(tmp_path, data, "-o", out, "--overwrite"), 2, *new)
    shutil.rmtree(tmp_path / "out.h5.run")
    again = read_only(tmp_path, data, "-o", out, "--items", "item0")
    assert again.returncode == 0, again.stderr
