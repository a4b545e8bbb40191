"""``mdattn convert``: other people's files become datasets, number for number."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shlex
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import open_dataset
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Span
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


def saved(folder: Path, **tensors: Any) -> Path:
    np.savez(folder / "a.npz", **tensors)
    return folder / "a.npz"


def problem_of(path: Path) -> AttentionProblem:
    with open_dataset(path) as dataset:
        (item,) = dataset.items
        return item.problem


class TestLayoutIsAsked:
    """Where shapes allow two readings, nothing is guessed."""

    @pytest.mark.parametrize("batch", [(), (2,)])
    def test_head_major_as_pytorch_has_it(
        self, tmp_path: Path, batch: tuple[int, ...], capsys: Any
    ) -> None:
        tensors = normal(FLOAT16, shape=(600, 600, 8, 8, 4, 4), batch=batch)
        path = saved(tmp_path, **transposed(tensors))
        refused(path, capsys, "8 tokens, 600 heads of 4, float16 or 600 tokens, 8 heads of 4")
        refused(path, capsys, "--layout head_major for 600 tokens, 8 heads")
        refused(path, capsys, "--layout token_major for 8 tokens, 600 heads")
        items = {"a": tensors}
        if batch:
            items = {f"a.{n}": {k: v[n] for k, v in tensors.items()} for n in range(2)}
        check(convert(path, "--layout", "head_major"), items)
        with open_dataset(convert(path, "--layout", "token_major")) as dataset:
            assert dataset.items[0].problem.kv_heads == 600

    @pytest.mark.parametrize(
        ("query", "kv", "asked"),
        [
            ((8, 600, 4), (2, 600, 4), True),
            ((8, 600, 4), (8, 5, 4), True),  # few keys, so that only the query looks odd
            ((8, 8, 4), (8, 8, 4), True),
            ((600, 8, 4), (600, 2, 4), False),
            ((1, 8, 4), (600, 8, 4), False),  # decoding: head-major makes no sense of it
            ((600, 8, 4), (8, 8, 4), True),
            ((601, 8, 4), (8, 8, 4), False),  # 601 heads are no multiple of 8
            ((1, 1, 4), (1, 1, 4), False),
            ((3, 8, 4), (2, 8, 4), True),  # more heads than tokens, and the only reading
            ((8, 600, 4), (2, 77, 4), True),  # head-major is the only reading
        ],
    )
    def test_when(self, tmp_path: Path, query: Any, kv: Any, asked: bool, capsys: Any) -> None:
        arrays = {
            "query": np.ones(query, np.float16),
            "key": np.ones(kv, np.float16),
            "value": np.ones(kv, np.float16),
        }
        path = saved(tmp_path, **arrays)
        if asked:
            refused(path, capsys, "say --layout")
        else:
            assert problem_of(convert(path)).q_tokens == query[0]

    def test_a_fix_that_is_named_works(self, tmp_path: Path, capsys: Any) -> None:
        arrays = {"query": (8, 600, 4), "key": (2, 77, 4), "value": (2, 77, 4)}
        path = saved(tmp_path, **{n: np.ones(s, np.float16) for n, s in arrays.items()})
        refused(path, capsys, "say --layout head_major for 600 tokens, 8 heads")
        assert problem_of(convert(path, "--layout", "head_major")).q_tokens == 600

    def test_a_file_may_say_it(self, tmp_path: Path) -> None:
        tensors = normal(FLOAT16, shape=(60, 60, 8, 8, 4, 4))
        write_dataset(tmp_path / "o.h5", {"a": tensors}, How(layout="head_major"))
        check(convert(tmp_path / "o.h5"), {"a": tensors})

    def test_a_dataset_of_ours_that_does_not_say_it(self, tmp_path: Path, capsys: Any) -> None:
        tensors = normal(FLOAT16, shape=(600, 600, 8, 8, 4, 4))
        write_dataset(tmp_path / "o.h5", {"a": transposed(tensors)})
        refused(tmp_path / "o.h5", capsys, "600 tokens, 8 heads")
        check(convert(tmp_path / "o.h5", "--layout", "head_major"), {"a": tensors})
        assert "600 tokens, 8 heads of 4, float16, head-major" in capsys.readouterr().out


class TestWhatAFileSays:
    """Mask and scale are kept; what a dataset can't say is refused by name."""

    @pytest.mark.parametrize("patterns", [[], ["query", "key", "value"]])
    @pytest.mark.parametrize("folder", ["items", "runs/7"])
    def test_attributes_of_hdf5(self, tmp_path: Path, folder: str, patterns: list[str]) -> None:
        tensors = normal(FLOAT16)
        with h5py.File(tmp_path / "f.h5", "w") as file:
            for name in ("x", "y"):
                for tensor, array in tensors.items():
                    file[f"{folder}/{name}/{tensor}"] = array
                file[f"{folder}/{name}"].attrs.update({"causal": "lower_right", "scale": 0.5})
            file[f"{folder}/y"].attrs.update({"causal": False, "scale": np.float32(0.25)})
        names = ["query", "key", "value"] if patterns or folder != "items" else []
        options = [f"--{name}={folder}/*/{name}" for name in names]
        with open_dataset(convert(tmp_path / "f.h5", *options)) as dataset:
            found = [(i.name, i.problem.causal, i.problem.scale) for i in dataset.items]
        assert found == [("x", "lower_right", 0.5), ("y", "none", 0.25)]
        overruled = convert(tmp_path / "f.h5", *options, "--causal", "--scale", "2")
        with open_dataset(overruled) as dataset:
            assert [i.problem.causal for i in dataset.items] == ["upper_left"] * 2
            assert [i.problem.scale for i in dataset.items] == [2.0] * 2

    def test_at_the_root_of_hdf5(self, tmp_path: Path, capsys: Any) -> None:
        tensors = normal(FLOAT16)
        with h5py.File(tmp_path / "f.h5", "w") as file:
            for name, array in tensors.items():
                file[name] = array
            file.attrs["causal"] = "lower_right"
            file.attrs["title"] = "a run"
        assert problem_of(convert(tmp_path / "f.h5")).causal == "lower_right"
        with h5py.File(tmp_path / "f.h5", "a") as file:
            file.attrs["window"] = 128
        refused(tmp_path / "f.h5", capsys, "attribute window")

    def test_above_the_items(self, tmp_path: Path, capsys: Any) -> None:
        with h5py.File(tmp_path / "f.h5", "w") as file:
            for name, array in normal(FLOAT16).items():
                file[f"items/x/{name}"] = array
            file["items"].attrs["scale"] = 0.5
        refused(tmp_path / "f.h5", capsys, "attribute scale, which only counts on an item")
        assert problem_of(convert(tmp_path / "f.h5", "--ignore", "scale")).scale == 0.25

    def test_values_in_npz(self, tmp_path: Path, capsys: Any) -> None:
        tensors = normal(FLOAT16, shape=(37, 37, 4, 2, 16, 16))
        path = saved(tmp_path, **tensors, causal=True, scale=np.float32(0.5))
        assert problem_of(convert(path)).causal == "upper_left"
        assert problem_of(convert(path)).scale == 0.5
        path = saved(tmp_path, **normal(FLOAT16), causal=True)
        refused(path, capsys, "query and key differ in length")
        assert problem_of(convert(path, "--causal-lower-right")).causal == "lower_right"
        path = saved(tmp_path, **tensors, scale=0.0)
        refused(path, capsys, "scale is 0")

    @pytest.mark.parametrize("name", ["window", "softcap", "segments", "mask"])
    def test_what_is_unknown_in_flat_files(self, tmp_path: Path, name: str, capsys: Any) -> None:
        tensors = normal(FLOAT16)
        path = saved(tmp_path, **tensors, **{name: np.arange(37)})
        refused(path, capsys, f"array or value {name}")
        check(convert(path, "--ignore", name), {"a": tensors})
        flat = {f"l.0.{key}": array for key, array in tensors.items()}
        save_file({**flat, f"l.0.{name}": np.arange(37)}, tmp_path / "m.safetensors")
        refused(tmp_path / "m.safetensors", capsys, f"array or value {name}")
        save_file(flat, tmp_path / "m.safetensors", metadata={name: "1"})
        refused(
            tmp_path / "m.safetensors",
            capsys,
            name,
            "--query=l.*.query",
            "--key=l.*.key",
            "--value=l.*.value",
        )
        check(convert(tmp_path / "m.safetensors", "--ignore", name), {"l.0": tensors})

    def test_what_is_unknown_in_a_dataset_of_ours(self, tmp_path: Path, capsys: Any) -> None:
        tensors = normal(FLOAT16)
        write_dataset(tmp_path / "o.h5", {"a": tensors}, None, {"a": {"sinks": 4}})
        refused(tmp_path / "o.h5", capsys, "attribute sinks")
        check(convert(tmp_path / "o.h5", "--ignore", "sinks"), {"a": tensors})


class TestPacked:
    """Query, key and value in one tensor; every entry is one that the others don't have."""

    def tensors(self, heads: tuple[int, int] = (2, 2)) -> Tensors:
        return normal(FLOAT16, shape=(40, 40, *heads, 8, 8))

    @pytest.mark.parametrize("dim", [0, 1, 2])
    @pytest.mark.parametrize("batch", [False, True])
    def test_stacked(self, tmp_path: Path, dim: int, batch: bool) -> None:
        tensors = self.tensors()
        packed = np.stack(list(tensors.values()), dim)
        path = saved(tmp_path, data=packed[None] if batch else packed)
        wanted = {"a.0" if batch else "a": tensors}
        check(convert(path, "--qkv", "data"), wanted)
        check(convert(path, "--qkv", "data", "--packed-dim", str(dim + batch)), wanted)
        check(convert(saved(tmp_path, qkv=packed)), {"a": tensors})

    def test_stacked_and_head_major(self, tmp_path: Path, capsys: Any) -> None:
        tensors = self.tensors()
        path = saved(tmp_path, qkv=np.stack(list(transposed(tensors).values())))
        refused(path, capsys, "say --layout")
        check(convert(path, "--layout", "head_major"), {"a": tensors})

    @pytest.mark.parametrize(("heads", "option"), [((2, 2), "2"), ((6, 2), "6/2")])
    @pytest.mark.parametrize("batch", [False, True])
    def test_flat(self, tmp_path: Path, heads: Any, option: str, batch: bool) -> None:
        tensors = self.tensors(heads)
        packed = np.concatenate([a.reshape(40, -1) for a in tensors.values()], -1)
        path = saved(tmp_path, qkv=packed[None] if batch else packed)
        check(convert(path, "--heads", option), {"a.0" if batch else "a": tensors})

    def test_one_after_the_other_in_every_head(self, tmp_path: Path, capsys: Any) -> None:
        tensors = self.tensors()
        path = saved(tmp_path, qkv=np.concatenate(list(tensors.values()), -1))
        refused(path, capsys, "--packed-dim -1")
        check(convert(path, "--packed-dim", "-1"), {"a": tensors})

    def test_stacked_without_heads(self, tmp_path: Path) -> None:
        tensors = self.tensors()
        packed = np.stack([a.reshape(40, -1) for a in tensors.values()], 1)
        check(
            convert(saved(tmp_path, qkv=packed), "--heads", "2", "--packed-dim=1"), {"a": tensors}
        )

    def test_key_and_value(self, tmp_path: Path) -> None:
        tensors = self.tensors((6, 2))
        key_value = np.stack([tensors["key"], tensors["value"]], 1)
        path = saved(tmp_path, q=tensors["query"], kv=key_value)
        check(convert(path, "--packed-dim", "1"), {"a": tensors})
        flat = {n: a.reshape(40, -1) for n, a in tensors.items()}
        path = saved(tmp_path, q=flat["query"], kv=np.hstack([flat["key"], flat["value"]]))
        check(convert(path, "--heads", "6/2"), {"a": tensors})

    def test_separate_without_heads(self, tmp_path: Path) -> None:
        tensors = self.tensors((6, 2))
        path = saved(tmp_path, **{n: a.reshape(40, -1) for n, a in tensors.items()})
        check(convert(path, "--heads", "6/2"), {"a": tensors})

    def test_what_is_refused(self, tmp_path: Path, capsys: Any) -> None:
        path = saved(tmp_path, x=np.ones((600, 3, 8, 64), np.float16))
        refused(path, capsys, "name it with --qkv", "--query=x", "--key=x", "--value=x")
        assert problem_of(convert(path, "--qkv", "x")).q_tokens == 600
        refused(saved(tmp_path, qkv=np.ones((3, 3, 8, 64), "f2")), capsys, "--packed-dim 0 or")
        path = saved(tmp_path, qkv=np.ones((40, 50), "f2"))
        refused(path, capsys, "has no dim of 3")
        refused(path, capsys, "has no dim of 3", "--heads", "4")
        refused(path, capsys, "isn't 3", "--packed-dim", "0")
        refused(path, capsys, "make no whole", "--qkv", "qkv", "--query", "q")


class TestNpy:
    """One array a file."""

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
    def test_three_files(self, tmp_path: Path, dtype: Any) -> None:
        tensors = normal(dtype)
        for name, array in tensors.items():
            np.save(tmp_path / f"{name}.npy", np.asfortranarray(array))
        files = [str(tmp_path / f"{name}.npy") for name in tensors]
        assert main(["convert", *files, str(tmp_path / "o.h5")]) == 0
        check(tmp_path / "o.h5", {"query": tensors})

    def test_one_file(self, tmp_path: Path, capsys: Any) -> None:
        tensors = normal(np.float32, shape=(40, 40, 2, 2, 8, 8))
        np.save(tmp_path / "x.npy", np.stack(list(tensors.values()), 1))
        refused(tmp_path / "x.npy", capsys, "it holds x [40, 3, 2, 8]")
        path = convert(tmp_path / "x.npy", "--qkv", "x", "--dtype", "fp16")
        check(path, {"x": {n: a.astype(FLOAT16) for n, a in tensors.items()}})

    def test_the_same_name_twice(self, tmp_path: Path, capsys: Any) -> None:
        np.save(tmp_path / "q.npy", np.ones((3, 2, 4), np.float16))
        file = str(tmp_path / "q.npy")
        assert main(["convert", file, file, str(tmp_path / "o.h5")]) == 2
        assert "is in the files before it too" in capsys.readouterr().err

    def test_damaged(self, tmp_path: Path, capsys: Any) -> None:
        np.save(tmp_path / "q.npy", np.ones((30, 2, 4), np.float16))
        os.truncate(tmp_path / "q.npy", 200)
        refused(tmp_path / "q.npy", capsys, "it claims")
        np.save(tmp_path / "q.npy", np.array([{}]), allow_pickle=True)
        refused(tmp_path / "q.npy", capsys, "holds object")


class Evil:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


class TestTorch:
    """PyTorch's own files; the tests of values need PyTorch, those of refusals don't."""

    def torch(self) -> Any:
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_dict_of_tensors(self, tmp_path: Path, zipped: bool) -> None:
        torch = self.torch()
        tensors = normal(np.float32)
        layer = {name[0]: torch.tensor(array).bfloat16() for name, array in tensors.items()}
        layer["q"] = layer["q"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        content = {"layers": [{**layer, "causal": "lower_right", "scale": 0.5}]}
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        path = convert(tmp_path / "m.pt", *(f"--{n}=layers.*.{n[0]}" for n in tensors))
        check(path, {"0": {n: a.astype(BFLOAT16) for n, a in tensors.items()}})
        assert problem_of(path).scale == 0.5
        assert problem_of(path).causal == "lower_right"

    def test_a_tensor_and_a_tuple(self, tmp_path: Path) -> None:
        torch = self.torch()
        tensors = normal(FLOAT16, shape=(40, 40, 2, 2, 8, 8))
        given = [torch.tensor(array) for array in tensors.values()]
        torch.save(torch.stack(given), tmp_path / "x.pt")
        check(convert(tmp_path / "x.pt", "--qkv", "x"), {"x": tensors})
        torch.save(tuple(given), tmp_path / "x.pt")
        check(convert(tmp_path / "x.pt", "--query=0", "--key=1", "--value=2"), {"x": tensors})

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_is_not_run(self, tmp_path: Path, zipped: bool, capsys: Any) -> None:
        torch = self.torch()
        torch.save(
            {"q": Evil(tmp_path / "loaded")},
            tmp_path / "m.pt",
            _use_new_zipfile_serialization=zipped,
        )
        refused(tmp_path / "m.pt", capsys, "isn't a .pt file of tensors alone")
        assert not (tmp_path / "loaded").exists()
        torch.load(tmp_path / "m.pt", weights_only=False)  # the control: this would have
        assert (tmp_path / "loaded").exists()

    def test_a_circle(self, tmp_path: Path, capsys: Any) -> None:
        torch = self.torch()
        circle: list[Any] = [torch.ones(2, 2, 2)]
        circle += [circle, circle]
        torch.save(circle, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", capsys, "no tensor matches; it holds 0 [2, 2, 2]")

    @pytest.mark.parametrize("content", [pickle.dumps([1.0]), pickle.dumps([1.0], 2)])
    def test_without_pytorch(
        self, tmp_path: Path, content: bytes, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        (tmp_path / "m.pt").write_bytes(content)
        refused(tmp_path / "m.pt", capsys, "which PyTorch alone can read")

    def test_an_old_pytorch(
        self, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.5.1+cu121"))
        (tmp_path / "m.pt").write_bytes(pickle.dumps([1.0]))
        refused(tmp_path / "m.pt", capsys, "PyTorch 2.5.1+cu121 may run code")


class TestOurOwn:
    """What `run` can't read in our format, `convert` can, by the command that `run` names."""

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f2"])
    def test_other_floats(self, tmp_path: Path, dtype: Any, capsys: Any) -> None:
        items = {"a": normal(dtype), "b": normal(dtype)}
        write_dataset(tmp_path / "o.h5", items, None, {"b": {"causal": "upper_left"}})
        command = self.command(tmp_path / "o.h5")
        assert main([word.replace("NEW.h5", str(tmp_path / "new.h5")) for word in command]) == 0
        target = FLOAT16 if dtype == ">f2" else BFLOAT16
        wanted = {i: {n: a.astype(target) for n, a in t.items()} for i, t in items.items()}
        check(tmp_path / "new.h5", wanted)
        with open_dataset(tmp_path / "new.h5") as dataset:
            assert [item.problem.causal for item in dataset.items] == ["none", "upper_left"]

    def test_bits_in_integers(self, tmp_path: Path, capsys: Any) -> None:
        tensors = random_tensors()
        write_dataset(tmp_path / "o.h5", {"a": {n: a.view(np.uint16) for n, a in tensors.items()}})
        refused(tmp_path / "o.h5", capsys, "holds uint16: maybe the bits of BF16")
        command = self.command(tmp_path / "o.h5")
        assert main([word.replace("NEW.h5", str(tmp_path / "new.h5")) for word in command]) == 0
        check(tmp_path / "new.h5", {"a": tensors})

    def command(self, path: Path) -> list[str]:
        with pytest.raises(RejectedError) as caught:
            open_dataset(path)
        found = re.search(r"mdattn (convert [^;(]*)", caught.value.fix)
        assert found
        return shlex.split(found[1])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, ">u2"])
@pytest.mark.parametrize(("option", "floats"), [("bf16", BFLOAT16), ("fp16", FLOAT16)])
def test_bits_in_any_file(
    tmp_path: Path, dtype: Any, option: str, floats: Any, capsys: Any
) -> None:
    tensors = random_tensors(dtype=floats)
    stored = {n: a.view(np.uint16).astype(dtype) for n, a in tensors.items()}
    path = saved(tmp_path, **stored)
    refused(path, capsys, "maybe the bits of BF16")
    check(convert(path, "--bits", option), {"a": tensors})
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for name, array in stored.items():
            file[name] = array
    check(convert(tmp_path / "f.h5", "--bits", option), {"f": tensors})


def test_float64_is_rounded_once(tmp_path: Path) -> None:
    tensors = {n: np.full(a.shape, 1 + 2.0**-8 + 2.0**-40) for n, a in normal("f8").items()}
    wanted = {n: np.full(a.shape, 1.0078125, BFLOAT16) for n, a in tensors.items()}
    check(convert(saved(tmp_path, **tensors), "--dtype", "bf16"), {"a": wanted})


def test_names_that_an_output_could_not_have(tmp_path: Path, capsys: Any) -> None:
    tensors = {f"{'x' * 199}.{n}": a for n, a in normal(FLOAT16, batch=(2,)).items()}
    save_file(tensors, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", capsys, "has 201 characters")


def test_two_items_of_one_name(tmp_path: Path, capsys: Any) -> None:
    tensors = normal(FLOAT16)
    both = {f"{p}.{n}": a for p in ("a/b.c", "a.b/c") for n, a in tensors.items()}
    save_file(both, tmp_path / "m.safetensors")
    patterns = [f"--{n}=*/*.{n}" for n in tensors]
    refused(tmp_path / "m.safetensors", capsys, "would both be item a.b.c", *patterns)


@pytest.mark.parametrize(
    ("content", "said", "fix"),
    [
        (gzip.compress(b"x" * 99), "compressed by gzip", "unpack"),
        (b"PAR1" + bytes(99), "a Parquet file", "save its tensors"),
        (b"CDF\x01" + bytes(99), "a netCDF-3 file", "nccopy"),
        (b"query,key,value\n1,2,3\n", "text", "save its tensors"),
        (b"", "empty", "copy it again"),
        (bytes(99), "of an unknown kind", "save its tensors"),
        (b"PK\x03\x04" + bytes(99), "a damaged zip", "copy it again"),
    ],
)
def test_files_of_other_kinds_are_named(
    tmp_path: Path, content: bytes, said: str, fix: str, capsys: Any
) -> None:
    """By `convert` and by what opens datasets, with a way out that isn't the other of the two."""
    path = tmp_path / "x"
    path.write_bytes(content)
    refused(path, capsys, said)
    with pytest.raises(RejectedError, match=said) as caught:
        open_dataset(path)
    assert fix in caught.value.fix
    assert "convert" not in caught.value.fix
