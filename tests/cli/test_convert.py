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
from mdattn_mpi.problem import Span
from tests.support.complaint import complaint
from tests.support.converting import (
    check,
    convert,
    normal,
    problem_of,
    refused,
    saved,
    transposed,
)
from tests.support.dataset_files import (
    BFLOAT16,
    FLOAT16,
    How,
    random_tensors,
    write_dataset,
    write_tensor,
)


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
        assert f"--allow {tmp_path / 'other'}" in complaint(capsys)
        path = convert(tmp_path / "f.h5", "--allow", str(tmp_path / "other"))
        check(path, {"f": tensors})


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
    refused(source, capsys, "head dims disagree: query")
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
        assert "is in the files before it too" in complaint(capsys)

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
        (gzip.compress(b"x" * 99, mtime=0), "compressed by gzip", "unpack"),
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


def test_a_number_that_is_too_large_for_either(tmp_path: Path, capsys: Any) -> None:
    tensors = {n: a * 1e39 for n, a in normal(np.float64).items()}
    refused(saved(tmp_path, **tensors), capsys, "scale the numbers down", "--dtype", "bf16")


def test_what_is_no_array_of_floats_is_listed(tmp_path: Path, capsys: Any) -> None:
    tensors = {**normal(FLOAT16), "query": np.ones((3, 2, 8), int)}
    refused(saved(tmp_path, **tensors), capsys, "query (no array of floats)")
    write_dataset(tmp_path / "o.h5", {"a": tensors})
    refused(tmp_path / "o.h5", capsys, "items/a/query (no array of floats)")


def test_values_that_belong_to_no_item(tmp_path: Path, capsys: Any) -> None:
    tensors = {f"l.{n}.{k}": a for n in range(2) for k, a in normal(FLOAT16).items()}
    items = {
        f"l.{n}": {k: tensors[f"l.{n}.{k}"] for k in ("query", "key", "value")} for n in range(2)
    }
    path = saved(tmp_path, **tensors, **{"l.1.scale": 0.5, "l.1.causal": "lower_right"})
    with open_dataset(convert(path)) as dataset:
        assert [item.problem.scale for item in dataset.items] == [0.25, 0.5]
    path = saved(tmp_path, **tensors, **{"config.window": 7, "config.layers": 2})
    refused(path, capsys, "value config.window, which only counts beside")
    check(convert(path, "--ignore", "window"), items)
