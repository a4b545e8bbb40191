"""Files that try to read other files, or to make the reader allocate or load what they like.

Every test has a secret beside the hostile file and tries to get at it.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.dataset import open_dataset, open_output, scanner
from mdattn_mpi.dataset.foreign.open import open_foreign
from mdattn_mpi.dataset.hdf5 import File
from mdattn_mpi.dataset.hdf5_types import bfloat16_type
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import Span
from tests.support.dataset_files import How, random_tensors, same_bits, write_dataset, write_tensor

Q = (37, 4, 16)
NBYTES = 37 * 4 * 16 * 2


class Trap:
    """A dataset whose item's query is still to be made, and a secret of the same shape."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "given"
        self.secrets = folder / "secrets"
        self.folder.mkdir()
        self.secrets.mkdir()
        self.path = self.folder / "a.h5"
        self.tensors = random_tensors()
        write_dataset(self.path, {"x": self.tensors})
        with h5py.File(self.path, "a") as file:
            del file["items/x/query"]
        self.secret = random_tensors()["query"]
        write_dataset(self.secrets / "s.h5", {"x": {"query": self.secret}})
        (self.secrets / "raw").write_bytes(self.secret.tobytes())

    def edit(self) -> h5py.File:
        return h5py.File(self.path, "a")

    def refused(self, said: str) -> None:
        """Nothing comes out, and what opens the file says why and how to allow it."""
        with pytest.raises(RejectedError, match=said) as caught:
            open_dataset(self.path)
        assert caught.value.fix
        with ExitStack() as stack:
            tensors = open_foreign(str(self.path), stack).tensors
            assert not any(
                same_bits(tensor.fetch((slice(None),) * 3), self.secret)
                for tensor in tensors.values()
                if tensor.fault is None and tensor.shape == Q
            )

    def read(self, *allow: Path) -> Any:
        with open_dataset(self.path, allow=[str(folder) for folder in allow]) as dataset:
            return dataset.read(dataset.items[0], "query", [Span(0, 37)])

    def allowed(self) -> None:
        """With the folder allowed it is read; with another one, or a look-alike, it is not."""
        assert same_bits(self.read(self.secrets), self.secret)
        assert same_bits(self.read(self.folder, self.secrets.parent), self.secret)
        lookalike = self.secrets.parent / "secre"
        lookalike.mkdir()
        for folder in (self.folder, lookalike):
            with pytest.raises(RejectedError):
                self.read(folder)


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


@pytest.mark.parametrize("relative", [False, True])
def test_an_external_link_to_a_tensor(trap: Trap, relative: bool) -> None:
    target = "../secrets/s.h5" if relative else str(trap.secrets / "s.h5")
    with trap.edit() as file:
        file["items/x/query"] = h5py.ExternalLink(target, "/items/x/query")
    trap.refused("the external link /items/x/query leads to another file")
    trap.allowed()


@pytest.mark.parametrize("place", ["items", "items/x"])
def test_an_external_link_to_a_group(trap: Trap, place: str) -> None:
    with trap.edit() as file:
        for tensor in ("key", "value"):
            file[f"items/x/{tensor}"].id  # noqa: B018
        del file[place]
        file[place] = h5py.ExternalLink(str(trap.secrets / "s.h5"), place)
    with h5py.File(trap.secrets / "s.h5", "a") as file:
        for tensor in ("key", "value"):
            write_tensor(file["items/x"], tensor, trap.tensors[tensor], _plain())
    trap.refused("external link")
    trap.allowed()


def test_a_soft_link_through_an_external_link(trap: Trap) -> None:
    with trap.edit() as file:
        file["door"] = h5py.ExternalLink(str(trap.secrets / "s.h5"), "/")
        file["items/x/query"] = h5py.SoftLink("/door/items/x/query")
    trap.refused("the external link /door leads to another file")
    trap.allowed()


def test_an_external_link_from_an_allowed_file_to_one_that_is_not(trap: Trap) -> None:
    other = trap.secrets.parent / "other"
    other.mkdir()
    with h5py.File(other / "o.h5", "w") as file:
        file["q"] = h5py.ExternalLink(str(trap.secrets / "s.h5"), "/items/x/query")
    with trap.edit() as file:
        file["items/x/query"] = h5py.ExternalLink(str(other / "o.h5"), "/q")
    with pytest.raises(RejectedError, match="external link"):
        trap.read(other)
    assert same_bits(trap.read(other, trap.secrets), trap.secret)


def test_a_link_of_the_filesystem_in_an_allowed_folder(trap: Trap) -> None:
    inside = trap.folder / "s.h5"
    inside.symlink_to(trap.secrets / "s.h5")
    with trap.edit() as file:
        file["items/x/query"] = h5py.ExternalLink("s.h5", "/items/x/query")
    with pytest.raises(RejectedError, match="external link"):
        trap.read(trap.folder)


def test_soft_links_inside_the_file_are_fine(trap: Trap) -> None:
    with trap.edit() as file:
        write_tensor(file, "elsewhere", trap.secret, _plain())
        file["items/x/query"] = h5py.SoftLink("/elsewhere")
    assert same_bits(trap.read(), trap.secret)
    with trap.edit() as file:
        del file["items/x/query"]
        file["items/x/again"] = h5py.SoftLink("../nothing/./query")
        file["items/x/query"] = h5py.SoftLink("value")
    with open_dataset(trap.path, ignore=("again",), keep_faults=True) as dataset:
        assert "head dims disagree" in dataset.faults[0].what


def test_links_that_go_round_in_circles(trap: Trap) -> None:
    with trap.edit() as file:
        file["items/x/query"] = h5py.SoftLink("/items/x/other")
        file["items/x/other"] = h5py.SoftLink("/items/x/query")
    with pytest.raises(RejectedError, match="round in circles"):
        open_dataset(trap.path)


def test_external_storage(trap: Trap) -> None:
    raw = str(trap.secrets / "raw")
    with trap.edit() as file:
        made = file.create_dataset("items/x/query", Q, np.uint16, external=[(raw, 0, NBYTES)])
        made.attrs["dtype"] = "bfloat16"
    trap.refused("the external storage of /items/x/query leads to another file")
    trap.allowed()


def test_external_storage_that_is_missing(trap: Trap) -> None:
    with trap.edit() as file:
        made = file.create_dataset("items/x/query", Q, np.uint16, external=[("gone", 0, NBYTES)])
        made.attrs["dtype"] = "bfloat16"
    with pytest.raises(RejectedError, match="no such file"):
        trap.read(trap.folder)


def virtual(trap: Trap, source: str) -> None:
    layout = h5py.VirtualLayout(Q, h5py.Datatype(bfloat16_type()))
    layout[:] = h5py.VirtualSource(source, "items/x/query", Q, h5py.Datatype(bfloat16_type()))
    with trap.edit() as file:
        file.create_virtual_dataset("items/x/query", layout)


def test_a_virtual_dataset(trap: Trap) -> None:
    virtual(trap, str(trap.secrets / "s.h5"))
    trap.refused("the virtual dataset /items/x/query leads to another file")
    trap.allowed()


def test_a_virtual_dataset_with_a_pattern_for_a_name(trap: Trap) -> None:
    """HDF5 would open s0.h5, s1.h5, … until there is no more."""
    unlimited = h5py.h5s.create_simple((0, 4, 16), (h5py.h5s.UNLIMITED, 4, 16))
    unlimited.select_hyperslab((0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1), None, (1, 4, 16))
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    source = str(trap.secrets / "s%b.h5").encode()
    created.set_virtual(unlimited, source, b"q", h5py.h5s.create_simple((1, 4, 16)))
    with trap.edit() as file:
        h5py.h5d.create(file["items/x"].id, b"query", bfloat16_type(), unlimited, created)
    trap.refused("virtual dataset")
    with pytest.raises(RejectedError, match="by a pattern"):
        trap.read(trap.secrets)


@pytest.mark.parametrize(
    ("variable", "kind"), [("HDF5_VDS_PREFIX", "virtual"), ("HDF5_EXTFILE_PREFIX", "external")]
)
def test_prefixes_that_send_hdf5_elsewhere(
    trap: Trap, monkeypatch: pytest.MonkeyPatch, variable: str, kind: str
) -> None:
    if kind == "virtual":
        virtual(trap, str(trap.secrets / "s.h5"))
    else:
        with trap.edit() as file:
            file.create_dataset(
                "items/x/query", Q, "f2", external=[(str(trap.secrets / "raw"), 0, NBYTES)]
            )
    monkeypatch.setenv(variable, str(trap.secrets))
    monkeypatch.setattr(scanner, "_child", None)
    with pytest.raises(RejectedError, match="lies in other files"):
        trap.read(trap.secrets)


def test_plugins_are_not_loaded(trap: Trap, tmp_path: Path) -> None:
    """A plugin beside the file, named by the environment, is not opened; an allowed one is."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    source = tmp_path / "plugin.c"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void loaded(void)"
        '{ FILE *f = fopen("%s", "w"); if (f) fclose(f); }\n' % (tmp_path / "loaded")
    )
    built = ["cc", "-shared", "-fPIC", "-o", str(plugins / "libevil.so"), str(source)]
    if subprocess.run(built, check=False, capture_output=True).returncode:
        pytest.skip("no C compiler")
    with trap.edit() as file:
        made = write_tensor(file["items/x"], "query", trap.secret, _plain(chunks=(37, 4, 16)))
        made.id.write_direct_chunk((0, 0, 0), bytes(NBYTES), filter_mask=0)
    _rename_filter(trap.path, 32015)
    program = "import sys; from mdattn_mpi.dataset import open_dataset; open_dataset(*sys.argv[1:2]"
    environment = {**os.environ, "HDF5_PLUGIN_PATH": str(plugins)}

    def loads(allow: str) -> bool:
        command = [sys.executable, "-c", f"{program}, allow=[{allow}])", str(trap.path)]
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=60
        )
        assert "which needs a plugin" in result.stderr
        return (tmp_path / "loaded").exists()

    assert not loads("")
    assert not loads(repr(str(tmp_path / "given")))
    assert loads(repr(str(plugins)))


def _rename_filter(path: Path, code: int) -> None:
    """Rewrite the query as a dataset with a filter that this HDF5 doesn't have."""
    with h5py.File(path, "a") as file:
        del file["items/x/query"]
        made = file.create_dataset(
            "items/x/query", data=np.zeros(Q, np.float16), chunks=Q, compression="lzf"
        )
        assert made.compression == "lzf"
    content = path.read_bytes()
    old = struct.pack("<H", h5py.h5z.FILTER_LZF)
    at = content.index(b"lzf\0") - 8
    assert content[at : at + 2] == old
    path.write_bytes(content[:at] + struct.pack("<H", code) + content[at + 2 :])


@pytest.mark.parametrize("name", ["..", "a\x1b[2J", "a\nb", "a\\b", "x" * 201, "a,b"])
def test_item_names_that_look_like_something_else(trap: Trap, name: str) -> None:
    with h5py.File(trap.path, "w") as file:
        file.attrs.update({"format": "mdattn-dataset", "version": 1})
        group = file.create_group("items")
        stored = h5py.h5g.create(group.id, f"tmp_{len(name)}".encode())
        del stored
    _rename_link(trap.path, f"tmp_{len(name)}", name)
    with pytest.raises(RejectedError) as caught:
        open_dataset(trap.path)
    assert str(caught.value).isprintable()


def _rename_link(path: Path, old: str, new: str) -> None:
    """Give a group a name that HDF5 itself may refuse."""
    with h5py.File(path, "a") as file:
        items = file["items"]
        try:
            items.move(old, new)
        except (ValueError, KeyError):
            pytest.skip("HDF5 itself refuses the name")
        if new not in list(items):
            pytest.skip("HDF5 reads it as a path")


class TestClaims:
    """Sizes that no file of this size can have."""

    def refused(self, path: Path, said: str) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(RejectedError, match=said):
                open_dataset(path)
            assert tracemalloc.get_traced_memory()[1] < 50 << 20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("tokens", [1 << 20, 1 << 40, 1 << 53])
    def test_contiguous(self, trap: Trap, tokens: int) -> None:
        with trap.edit() as file:
            stored, space = bfloat16_type(), h5py.h5s.create_simple((37, 4, 16))
            created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            created.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            h5py.h5d.create(file["items/x"].id, b"query", stored, space, created)
        _claim(trap.path, (37, 4, 16), (tokens, 4, 16))
        self.refused(trap.path, "claims|disagree|HDF5 can't read")

    def test_never_written(self, trap: Trap) -> None:
        with trap.edit() as file:
            h5py.h5d.create(
                file["items/x"].id,
                b"query",
                bfloat16_type(),
                h5py.h5s.create_simple((1 << 58, 4, 1)),
            )
        self.refused(trap.path, "was never written")

    @pytest.mark.parametrize("chunk", [(1, 1, 1), (1 << 20, 4, 16)])
    def test_chunked(self, trap: Trap, chunk: tuple[int, int, int]) -> None:
        with trap.edit() as file:
            file.create_dataset(
                "items/x/query", (1 << 58, 4, 16), "f2", chunks=chunk, compression="gzip"
            )
        self.refused(trap.path, "claims .* bytes in .* chunks")

    def test_huge_chunks(self, trap: Trap) -> None:
        with trap.edit() as file:
            file.create_dataset("items/x/query", (1 << 25, 4, 16), "f2", chunks=(1 << 24, 4, 16))
        self.refused(trap.path, "has chunks of")

    def test_missing_chunks(self, trap: Trap) -> None:
        with trap.edit() as file:
            made = file.create_dataset("items/x/query", Q, "f2", chunks=(10, 4, 16))
            made[:20] = 1
        self.refused(trap.path, "has 2 of its 4 chunks")

    def test_a_compressed_bomb(self, trap: Trap) -> None:
        """A chunk that inflates to far more than its size says."""
        with trap.edit() as file:
            made = file.create_dataset("items/x/query", Q, "f2", chunks=Q, compression="gzip")
            made.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(100 << 20)))
            for tensor in ("key", "value"):
                del file[f"items/x/{tensor}"]
                file[f"items/x/{tensor}"] = np.zeros((23, 2, 16), np.float16)
        with open_dataset(trap.path) as dataset, pytest.raises(Exception, match="chunk"):
            dataset.read(dataset.items[0], "query", [Span(0, 37)])

    def test_many_items_of_a_batch(self, trap: Trap) -> None:
        with h5py.File(trap.path, "w") as file:
            file.attrs.update({"format": "mdattn-dataset", "version": 1})
            for tensor in ("query", "key", "value"):
                file.create_dataset(
                    f"items/x/{tensor}",
                    data=np.zeros((200_000, 1, 1, 1), np.float16),
                    chunks=(100_000, 1, 1, 1),
                    compression="gzip",
                )
        self.refused(trap.path, "more than 100000 entries")


def _claim(path: Path, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Change the extent in the header of the one dataset that has it."""
    content = path.read_bytes()
    before, after = struct.pack("<3Q", *old), struct.pack("<3Q", *new)
    assert before in content
    path.write_bytes(content.replace(before, after))


@pytest.mark.parametrize("kind", ["dataset", "output"])
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RejectedError, match="no regular file"):
            (open_dataset if kind == "dataset" else open_output)(path)


def test_what_is_allowed_is_opened_once(trap: Trap) -> None:
    with trap.edit() as file:
        file["items/x/query"] = h5py.ExternalLink(str(trap.secrets / "s.h5"), "/items/x/query")
        file["items/y"] = h5py.ExternalLink(str(trap.secrets / "s.h5"), "/items/x")
    with File(trap.path, [str(trap.secrets)]) as opened:
        assert [file.path for file in opened.files] == [
            str(trap.path),
            str(trap.secrets / "s.h5"),
        ]


def _plain(**storage: Any) -> How:
    return How("float", storage=storage)
