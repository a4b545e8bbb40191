"""``mdattn convert``: other people's files become datasets, number for number."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import open_dataset
from mdattn_mpi.problem import Span
from tests.support.dataset_files import (
    BFLOAT16,
    FLOAT16,
    How,
    random_tensors,
    same_bits,
    write_dataset,
    write_tensor,
)

Tensors = dict[str, Any]


def convert(source: Path, *options: str) -> Path:
    """Run the command."""
    path = source.with_name("converted.h5")
    assert main(["convert", str(source), str(path), "--overwrite", *options]) == 0
    return path


def check(path: Path, items: dict[str, Tensors]) -> None:
    """A dataset holds just these items, contiguous and token-major."""
    with open_dataset(path) as dataset:
        assert [item.name for item in dataset.items] == list(items)
        assert not dataset.warnings
        for item in dataset.items:
            for name, array in items[item.name].items():
                read = dataset.read(item, name, (Span(0, len(array)),))  # type: ignore[arg-type]
                assert same_bits(read, np.ascontiguousarray(array))
                data = dataset.tensor(item, name)  # type: ignore[arg-type]
                assert dataset.checksum(item, name) == data.crc32  # type: ignore[arg-type]


def normal(dtype: Any, **options: Any) -> Tensors:
    """Numbers that survive arithmetic."""
    shapes = random_tensors(dtype=FLOAT16, **options)
    draw = np.random.default_rng()
    return {n: draw.standard_normal(a.shape).astype(dtype) for n, a in shapes.items()}


def transposed(tensors: Tensors) -> Tensors:
    return {name: np.ascontiguousarray(array.swapaxes(-3, -2)) for name, array in tensors.items()}


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_16_bit_numbers_are_kept(self, tmp_path: Path, save: Any) -> None:
        tensors = random_tensors(dtype=FLOAT16)
        save(tmp_path / "a.npz", **tensors)
        check(convert(tmp_path / "a.npz"), {"a": tensors})

    def test_bfloat16_as_numpy_saves_it(self, tmp_path: Path) -> None:
        tensors = random_tensors(dtype=BFLOAT16)
        np.savez(tmp_path / "a.npz", **tensors)
        check(convert(tmp_path / "a.npz"), {"a": tensors})

    @pytest.mark.parametrize(("option", "dtype"), [("bf16", BFLOAT16), ("fp16", FLOAT16)])
    @pytest.mark.parametrize("source", [np.float32, np.float64, ">f4", np.float16])
    def test_rounding(self, tmp_path: Path, option: str, dtype: Any, source: Any) -> None:
        tensors = normal(source)
        np.savez(tmp_path / "a.npz", **tensors)
        wanted = {name: array.astype(dtype) for name, array in tensors.items()}
        check(convert(tmp_path / "a.npz", "--dtype", option), {"a": wanted})

    def test_fortran_order_and_head_major(self, tmp_path: Path) -> None:
        tensors = normal(FLOAT16)
        arrays = {n: np.asfortranarray(a) for n, a in transposed(tensors).items()}
        np.savez(tmp_path / "a.npz", **arrays)
        check(convert(tmp_path / "a.npz", "--layout", "head_major"), {"a": tensors})

    @pytest.mark.parametrize("layout", ["token_major", "head_major"])
    def test_a_batch_dim(self, tmp_path: Path, layout: str) -> None:
        tensors = normal(FLOAT16, batch=(3,))
        stored = transposed(tensors) if layout == "head_major" else tensors
        np.savez(tmp_path / "b.npz", **stored)
        items = {f"b.{n}": {k: v[n] for k, v in tensors.items()} for n in range(3)}
        check(convert(tmp_path / "b.npz", "--layout", layout), items)


class TestSafetensors:
    def test_several_items_in_natural_order(self, tmp_path: Path) -> None:
        items = {f"{n}": random_tensors(dtype=BFLOAT16) for n in (1, 2, 10)}
        tensors = {f"l.{n}.{t[0]}": a for n, found in items.items() for t, a in found.items()}
        save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "np"})
        patterns = ["--query", "l.*.q", "--key", "l.*.k", "--value", "l.*.v"]
        check(convert(tmp_path / "m.safetensors", *patterns), items)
        path = convert(tmp_path / "m.safetensors")
        check(path, {f"l.{name}": found for name, found in items.items()})

    def test_mask_and_scale(self, tmp_path: Path) -> None:
        tensors = random_tensors(dtype=FLOAT16)
        save_file(tensors, tmp_path / "m.safetensors")
        options = ["--causal-lower-right", "--scale", "0.5"]
        with open_dataset(convert(tmp_path / "m.safetensors", *options)) as dataset:
            assert dataset.items[0].problem.causal == "lower_right"
            assert dataset.items[0].problem.scale == 0.5


class TestHdf5:
    @pytest.mark.parametrize("storage", [{}, {"chunks": (5, 1, 3), "compression": "gzip"}])
    @pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, np.dtype(">f2")])
    def test_anywhere_in_a_file(
        self, tmp_path: Path, dtype: Any, storage: Any, capsys: Any
    ) -> None:
        items = {"a.x": normal(dtype), "b.x": normal(dtype)}
        with h5py.File(tmp_path / "f.h5", "w") as file:
            for name, tensors in items.items():
                group = file.create_group(f"runs/{name[0]}/x")
                for tensor, array in tensors.items():
                    write_tensor(group, tensor[0].upper(), array, How(storage=storage))
            file["runs/a/x/note"] = "text"
            file["loop"] = file["/"]
        patterns = [f"--{t}=/runs/*/*/{t[0].upper()}" for t in ("query", "key", "value")]
        wanted = {
            name: {t: a.astype(a.dtype.newbyteorder("=")) for t, a in tensors.items()}
            for name, tensors in items.items()
        }
        refused(tmp_path / "f.h5", capsys, "has dataset note", *patterns)
        check(convert(tmp_path / "f.h5", *patterns, "--ignore", "note"), wanted)

    def test_32_bit(self, tmp_path: Path) -> None:
        tensors = normal(np.float32)
        with h5py.File(tmp_path / "f.h5", "w") as file:
            for name, array in tensors.items():
                file.create_dataset(name, data=array, chunks=True)
        wanted = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
        check(convert(tmp_path / "f.h5", "--dtype", "bf16"), {"f": wanted})

    def test_a_dataset_of_ours_is_rewritten(self, tmp_path: Path) -> None:
        items = {"a": random_tensors(), "b": random_tensors()}
        how = How("opaque", "head_major", {"chunks": True, "compression": "gzip"})
        attributes = {"b": {"causal": "upper_left", "scale": 0.25}}
        write_dataset(tmp_path / "o.h5", items, how, attributes)
        path = convert(tmp_path / "o.h5")
        check(path, items)
        with open_dataset(path) as dataset:
            assert [item.problem.causal for item in dataset.items] == ["none", "upper_left"]

    def test_links_to_other_files(self, tmp_path: Path, capsys: Any) -> None:
        tensors = random_tensors(dtype=FLOAT16)
        (tmp_path / "other").mkdir()
        with h5py.File(tmp_path / "other" / "s.h5", "w") as file:
            file["q"] = tensors["query"]
        with h5py.File(tmp_path / "f.h5", "w") as file:
            file["query"] = h5py.ExternalLink("other/s.h5", "q")
            file["key"], file["value"] = tensors["key"], tensors["value"]
        options = ["convert", str(tmp_path / "f.h5"), str(tmp_path / "o.h5")]
        assert main(options) == 2
        assert f"--allow {tmp_path / 'other'}" in capsys.readouterr().err
        path = convert(tmp_path / "f.h5", "--allow", str(tmp_path / "other"))
        check(path, {"f": tensors})


def refused(source: Path, capsys: pytest.CaptureFixture[str], said: str, *options: str) -> None:
    """The command says why, and leaves nothing."""
    target = source.with_name("refused.h5")
    assert main(["convert", str(source), str(target), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(source) in error or "pattern" in error
    assert "Fix:" in error
    assert not [name for name in os.listdir(source.parent) if "refused" in name]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.npz"
    np.savez(source, **normal(np.float32))
    refused(source, capsys, "its dtype is float32")
    refused(source, capsys, "these patterns make no whole", "--query", "q")
    names = ["--query", "query", "--key", "key", "--value", "nothing"]
    refused(source, capsys, "holds no tensor 'nothing'", *names)
    nothing = ["--query", "x*", "--key", "y*", "--value", "z*"]
    refused(source, capsys, "no tensor matches; it holds query", *nothing)
    refused(source, capsys, "no multiple of", "--dtype", "bf16", "--layout", "head_major")
    np.savez(source, **{**normal(np.float32), "query": np.zeros((3, 5), np.float32)})
    refused(source, capsys, "shapes are", "--dtype", "bf16")
    np.savez(source, **{**normal(FLOAT16), "key": np.zeros((23, 2, 9), np.float16)})
    refused(source, capsys, "shapes disagree")
    np.savez(source, **{**normal(FLOAT16), "key": normal(BFLOAT16)["key"]})
    refused(source, capsys, "dtypes disagree")
    tensors = normal(np.float32)
    tensors["value"][3, 1, 2] = 1e6
    np.savez(source, **tensors)
    refused(source, capsys, "too large for float16", "--dtype", "fp16")
    convert(source, "--dtype", "bf16")


def test_infinity_and_nan_stay_what_they_are(tmp_path: Path) -> None:
    tensors = normal(np.float32)
    tensors["value"][0, 0, :3] = np.inf, -np.inf, np.nan
    np.savez(tmp_path / "a.npz", **tensors)
    with open_dataset(convert(tmp_path / "a.npz", "--dtype", "fp16")) as dataset:
        first = dataset.read(dataset.items[0], "value", (Span(0, 1),))[0, 0, :3]
    np.testing.assert_array_equal(first.astype(float), [np.inf, -np.inf, np.nan])


class TestHostile:
    """Headers that claim what isn't there; pickles."""

    def safetensors(self, path: Path, header: Any, content: bytes = b"") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content)
        return path

    @pytest.mark.parametrize(
        "about",
        [
            {"dtype": "F16", "shape": [1 << 60, 2, 2], "data_offsets": [0, 1 << 63]},
            {"dtype": "F16", "shape": [2, 2, 2], "data_offsets": [0, 8]},
            {"dtype": "F16", "shape": [2, 2, 2], "data_offsets": [90, 106]},
            {"dtype": "F16", "shape": [-2, -2, 4], "data_offsets": [0, 32]},
            {"dtype": "F16", "shape": [2, 2, 2], "data_offsets": [-16, 0]},
            {"dtype": "F16", "shape": [2.0, 2, 2], "data_offsets": [0, 16]},
            {"dtype": "F16", "shape": "abc", "data_offsets": [0, 16]},
            {"dtype": "F16"},
            [],
        ],
    )
    def test_safetensors(self, tmp_path: Path, capsys: Any, about: Any) -> None:
        path = self.safetensors(tmp_path / "m.st", {"query": about}, bytes(64))
        refused(path, capsys, "can't be read")

    @pytest.mark.parametrize("header", [b"{", b"{]", b'{"a":' * 100_000, b"{\xff}"])
    def test_safetensors_headers(self, tmp_path: Path, capsys: Any, header: bytes) -> None:
        refused(self.safetensors(tmp_path / "m.st", header), capsys, "can't be read")

    def test_a_header_longer_than_the_file(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "m.st").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
        refused(tmp_path / "m.st", capsys, "its header claims")

    def npz(self, path: Path, header: str, content: bytes = b"") -> Path:
        text = header.encode().ljust(118) + b"\n"
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("query.npy", npy)
        return path

    def test_an_array_larger_than_its_member(self, tmp_path: Path, capsys: Any) -> None:
        header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({1 << 58}, 2, 2)}}"
        refused(self.npz(tmp_path / "a.npz", header, bytes(64)), capsys, "claims")

    def test_a_bomb(self, tmp_path: Path, capsys: Any) -> None:
        path = self.npz(tmp_path / "a.npz", "{'descr': '<f2'}", bytes(4 << 20))
        content = bytearray(path.read_bytes())
        at = content.rindex(b"PK\x01\x02") + 24  # the size that the archive's index claims
        content[at : at + 4] = struct.pack("<I", (1 << 32) - 2)
        path.write_bytes(content)
        refused(path, capsys, "claims")

    def test_pickles_are_not_loaded(self, tmp_path: Path, capsys: Any) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "loaded",))

        np.savez(tmp_path / "a.npz", query=np.array([Evil()], object), key=1.0, value=1.0)
        refused(tmp_path / "a.npz", capsys, "no tensor matches")
        assert not (tmp_path / "loaded").exists()

    def test_names_of_tensors(self, tmp_path: Path, capsys: Any) -> None:
        tensors = random_tensors(dtype=FLOAT16)
        hostile = {f"..\x1b[2J.{name}": array for name, array in tensors.items()}
        save_file(hostile, tmp_path / "m.safetensors")
        refused(tmp_path / "m.safetensors", capsys, "control characters")

    @pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04" + bytes(100), b"text" * 9])
    def test_other_files(self, tmp_path: Path, capsys: Any, content: bytes) -> None:
        (tmp_path / "x").write_bytes(content)
        refused(tmp_path / "x", capsys, "")

    def test_places_that_are_no_files(self, tmp_path: Path, capsys: Any) -> None:
        refused(tmp_path / "nothing", capsys, "No such file")
        (tmp_path / "folder").mkdir()
        refused(tmp_path / "folder", capsys, "is a folder")
