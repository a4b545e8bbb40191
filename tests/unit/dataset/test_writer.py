"""Making an output: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import ml_dtypes
import numpy as np
import pytest

from mdattn_mpi.dataset import Item, create_output, open_output
from mdattn_mpi.dataset import writer as writer_module
from mdattn_mpi.dataset.ledger import ledger_columns
from mdattn_mpi.dataset.writer import add_group, new_file
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem


def items(count: int = 3, **options: Any) -> list[Item]:
    """Items of different lengths."""
    return [
        Item(f"i{n}", n, AttentionProblem(10 + n, 7, 4, 2, 8, 6, **options)) for n in range(count)
    ]


def test_what_plain_h5py_finds(tmp_path: Path) -> None:
    create_output(
        tmp_path / "o.h5", items(), ranks=3, lse=True, attributes={"who": "mé", "n": 3, "x": 0.5}
    )
    with h5py.File(tmp_path / "o.h5") as file:
        assert file.attrs["format"] == b"mdattn-output"  # of fixed length: h5py gives bytes
        assert file.attrs["version"] == 1
        assert file.attrs["who"].decode() == "mé"
        assert (file.attrs["n"], file.attrs["x"], file.attrs["ranks"]) == (3, 0.5, 3)
        for n in range(3):
            group = file[f"items/i{n}"]
            assert group["output"].shape == (10 + n, 4, 6)
            assert group["output"].dtype == np.float32  # as h5py shows a BF16
            assert group["output"].id.get_type().get_size() == 2
            assert group["lse"].shape == (10 + n, 4)
            assert group["lse"].dtype == np.float32
            assert group.attrs["index"] == n
            assert json.loads(group.attrs["problem"])["q_tokens"] == 10 + n
            for name in ("output", "lse"):
                assert group[name].id.get_offset()
                assert group[name].chunks is None
        for name in ("state", "crc32", "spans", "ranks", "strategy", "reason"):
            assert len(file[f"ledger/{name}"]) == 3
            assert not file[f"ledger/{name}"][:].tobytes().strip(b"\0")
        assert file["ledger/crc32"].shape[1] >= 3


def test_every_dataset_has_bytes_of_its_own(tmp_path: Path) -> None:
    create_output(tmp_path / "o.h5", items(), ranks=3, lse=True)
    places = []
    with h5py.File(tmp_path / "o.h5") as file:
        file.visititems(
            lambda _, node: (
                places.append((node.id.get_offset(), node.nbytes // _widening(node)))
                if isinstance(node, h5py.Dataset)
                else None
            )
        )
    places.sort()
    assert len(places) == 6 + 6
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places))
    assert places[-1][0] + places[-1][1] <= (tmp_path / "o.h5").stat().st_size


def _widening(node: Any) -> int:
    return int(node.dtype.itemsize // node.id.get_type().get_size())


def test_without_lse_there_is_none(tmp_path: Path) -> None:
    create_output(tmp_path / "o.h5", items(dtype="float16"), ranks=1)
    with open_output(tmp_path / "o.h5") as output:
        assert not output.lse
        assert [item.problem for item in output.items] == [
            i.problem for i in items(dtype="float16")
        ]
        assert output.read(output.items[0], "output").dtype == np.float16


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "o.h5"
    create_output(path, items(1), ranks=1)
    before = path.read_bytes()
    with pytest.raises(RejectedError, match="exists already") as caught:
        create_output(path, items(2), ranks=1)
    assert "--overwrite" in caught.value.fix
    assert path.read_bytes() == before
    create_output(path, items(2), ranks=1, overwrite=True)
    with open_output(path) as output:
        assert len(output.items) == 2
    assert os.listdir(tmp_path) == ["o.h5"]


def test_through_a_link_of_the_filesystem(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "o.h5").symlink_to(tmp_path / "scratch" / "real.h5")
    (tmp_path / "scratch" / "real.h5").write_bytes(b"")
    with pytest.raises(RejectedError, match="exists already"):
        create_output(tmp_path / "o.h5", items(), ranks=1)
    create_output(tmp_path / "o.h5", items(), ranks=1, overwrite=True)
    assert (tmp_path / "o.h5").is_symlink()
    assert (tmp_path / "scratch" / "real.h5").stat().st_size


class Bad(NamedTuple):
    """A place where nothing can be written, and what is said."""

    path: str
    said: str


@pytest.mark.parametrize(
    "bad",
    [
        Bad("missing/o.h5", "its folder .* doesn't exist"),
        Bad(".", "is a folder"),
        Bad("file/o.h5", "its folder .* doesn't exist"),
    ],
)
def test_places_that_are_none(tmp_path: Path, bad: Bad) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RejectedError, match=bad.said) as caught:
        create_output(tmp_path / bad.path, items(), ranks=1)
    assert caught.value.fix
    assert caught.value.file == str(tmp_path / bad.path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RejectedError, match="ermission"):
        create_output(tmp_path / "o.h5", items(), ranks=1)


def test_more_than_the_filesystem_has_free(tmp_path: Path) -> None:
    huge = Item("huge", 0, AttentionProblem(1 << 40, 1, 64, 1, 128, 128))
    with pytest.raises(RejectedError, match=r"needs .* GB, and .* has .* GB free"):
        create_output(tmp_path / "o.h5", [huge], ranks=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["reserve", "fsync", "rename"])
def test_a_disk_that_is_full_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    create_output(tmp_path / "o.h5", items(1), ranks=1)
    before = (tmp_path / "o.h5").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "reserve":
        monkeypatch.setattr(writer_module, "_reserve", full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(RejectedError, match="No space left") as caught:
        create_output(tmp_path / "o.h5", items(2), ranks=1, overwrite=True)
    assert "free some space" in caught.value.fix
    assert os.listdir(tmp_path) == ["o.h5"]
    assert (tmp_path / "o.h5").read_bytes() == before


def test_space_is_reserved(tmp_path: Path) -> None:
    item = Item("i", 0, AttentionProblem(4096, 1, 8, 1, 128, 128))
    create_output(tmp_path / "o.h5", [item], ranks=1)
    about = (tmp_path / "o.h5").stat()
    if about.st_blocks * 512 < about.st_size // 2:
        pytest.skip("this filesystem can't reserve")
    assert about.st_blocks * 512 >= about.st_size


def test_a_ledger_is_all_zeros_whatever_lay_there(tmp_path: Path) -> None:
    """Only what no byte was written to yet is zero by itself."""
    with new_file(tmp_path / "o.h5", 1) as file:
        end = os.fstat(fd := file.id.get_vfd_handle()).st_size
        os.pwrite(fd, b"\xff" * 40_000, end)  # it ends within the ledger
        book = add_group(file, "ledger")
        writer_module._create_ledger(book, ledger_columns(100, 64, 2))
        assert book["spans"].id.get_offset() < end + 40_000
    with h5py.File(tmp_path / "o.h5") as file:
        for column in file["ledger"].values():
            assert not column[:].tobytes().strip(b"\0")


def test_an_error_in_between_leaves_nothing(tmp_path: Path) -> None:
    def attempt() -> None:
        with new_file(tmp_path / "a.h5", 1) as file:
            file["x"] = 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert os.listdir(tmp_path) == []


def test_killed_in_between_there_is_no_output(tmp_path: Path) -> None:
    """Whatever is left behind isn't under the name of the output, and doesn't hinder the next."""
    program = (
        "import os, signal, sys\n"
        "from mdattn_mpi.dataset.writer import new_file\n"
        "with new_file(sys.argv[1], 1) as file:\n"
        "    file['x'] = range(1000); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "o.h5"
    run = [sys.executable, "-c", program, str(path)]
    killed = subprocess.run(run, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    create_output(path, items(), ranks=1)
    assert os.listdir(tmp_path) == ["o.h5"]


def test_long_attributes(tmp_path: Path) -> None:
    text = "x" * 100_000
    create_output(tmp_path / "o.h5", items(1), ranks=1, attributes={"log": text, "empty": ""})
    with open_output(tmp_path / "o.h5") as output:
        assert output.attributes["log"] == text
        assert output.attributes["empty"] == ""


def test_hundreds_of_items(tmp_path: Path) -> None:
    create_output(tmp_path / "o.h5", items(400), ranks=2, lse=True)
    with open_output(tmp_path / "o.h5") as output:
        assert [item.name for item in output.items] == [f"i{n}" for n in range(400)]
        assert ml_dtypes.bfloat16 == output.read(output.items[-1], "output").dtype
