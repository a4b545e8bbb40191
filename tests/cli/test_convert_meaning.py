"""``mdattn convert``: what shapes, attributes and packed tensors of other people's files mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import open_dataset
from mdattn_mpi.dataset.making import DatasetWriter
from tests.support.converting import (
    Tensors,
    check,
    convert,
    normal,
    problem_of,
    refused,
    saved,
    transposed,
)
from tests.support.dataset_files import (
    FLOAT16,
    How,
    write_dataset,
)


class TestLayoutIsAsked:
    """Where shapes allow two readings, nothing is guessed."""

    @pytest.mark.parametrize("batch", [(), (2,)])
    def test_head_major_as_pytorch_has_it(
        self, tmp_path: Path, batch: tuple[int, ...], capsys: Any
    ) -> None:
        tensors = normal(FLOAT16, shape=(600, 600, 8, 8, 4, 4), batch=batch)
        path = saved(tmp_path, **transposed(tensors))
        refused(
            path, capsys, "is it 8 tokens, 600 heads of 4, float16, or 600 tokens, 8 heads of 4"
        )
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
        refused(tmp_path / "f.h5", capsys, "window is")

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

    @pytest.mark.parametrize("name", ["window", "softcap", "bias", "mask"])
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


class TestSinksAndSegments:
    """They lie beside the tensors, in any kind of file."""

    SHAPE = (37, 37, 4, 2, 16, 16)
    SINKS = np.array([0.5, -np.inf, 3, 2], np.float32)

    def tensors(self) -> Tensors:
        return normal(FLOAT16, shape=self.SHAPE)

    def check(self, path: Path, tensors: Tensors, starts: tuple[int, ...] = (0, 5, 20)) -> None:
        check(path, {name: {**own, "sinks": self.SINKS} for name, own in tensors.items()})
        with open_dataset(path) as dataset:
            for item in dataset.items:
                assert item.problem.segments == starts
                assert item.problem.sinks

    @pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
    def test_in_flat_files(self, tmp_path: Path, dtype: Any) -> None:
        tensors, starts = self.tensors(), np.array([0, 5, 20], dtype)
        more = {"sinks": self.SINKS, "segments": starts}
        self.check(convert(saved(tmp_path, **tensors, **more)), {"a": tensors})
        more["sinks"] = self.SINKS.astype(ml_dtypes.bfloat16)
        flat = {f"l.0.{key}": array for key, array in {**tensors, **more}.items()}
        save_file(flat, tmp_path / "m.safetensors")
        names = [f"--{key}=l.*.{key}" for key in tensors]
        self.check(convert(tmp_path / "m.safetensors", *names), {"0": tensors})

    def test_in_a_pt_file(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        tensors = self.tensors()
        arrays = {**tensors, "sinks": self.SINKS, "segments": np.array([0, 5, 20])}
        arrays["window"] = np.array([7, 0])
        content = {name: torch.tensor(array) for name, array in arrays.items()}
        torch.save({**content, "causal": "upper_left"}, tmp_path / "a.pt")
        self.check(convert(tmp_path / "a.pt"), {"a": tensors})
        assert problem_of(tmp_path / "converted.h5").window == (7, 0)

    def test_in_npy_files(self, tmp_path: Path) -> None:
        arrays = {**self.tensors(), "sinks": self.SINKS, "segments": np.array([0, 5, 20])}
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
        sources = [str(tmp_path / f"{name}.npy") for name in arrays]
        path = tmp_path / "converted.h5"
        assert main(["convert", *sources, str(path)]) == 0
        self.check(path, {"query": {name: arrays[name] for name in ("query", "key", "value")}})

    @pytest.mark.parametrize("ours", [True, False])
    def test_in_hdf5_entries_of_a_batch_share_them(self, tmp_path: Path, ours: bool) -> None:
        batch = normal(np.float32, shape=self.SHAPE, batch=(2,))
        with h5py.File(tmp_path / "a.h5", "w") as file:
            if ours:
                file.attrs.update({"format": "mdattn-dataset", "version": 1})
            group = file.create_group("items/a")
            for name, array in {**batch, "sinks": self.SINKS.astype(">f8")}.items():
                group[name] = array
            group["segments"] = np.array([0, 5, 20], ">i4")
        path = convert(tmp_path / "a.h5", "--dtype", "fp16")
        rounded = {name: array.astype(np.float16) for name, array in batch.items()}
        items = {f"a.{n}": {k: array[n] for k, array in rounded.items()} for n in range(2)}
        self.check(path, items)

    def test_a_dataset_of_ours_keeps_them(self, tmp_path: Path) -> None:
        tensors = self.tensors()
        with DatasetWriter(tmp_path / "o.h5", layout="head_major") as dataset:
            q, k, v = tensors.values()
            dataset.add("a", q, k, v, sinks=self.SINKS, segments=(0, 5, 20))
        self.check(convert(tmp_path / "o.h5"), {"a": tensors})

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"sinks": np.zeros(2, np.float32)}, "its sinks are [2]"),
            ({"sinks": np.full(4, 1e300)}, "too large for float32"),
            ({"sinks": np.zeros(4, np.int32)}, "array or value sinks"),
            ({"sinks": np.zeros(4, np.int16)}, "maybe the bits of BF16"),
            ({"segments": np.array([0, 37])}, "37 is none of 37 tokens"),
            ({"segments": np.array([1, 7])}, "segments begin with 1"),
            ({"segments": np.arange(4097)}, "4097 segments"),
            ({"segments": np.zeros(3)}, "array or value segments"),
            ({"window": np.array([-2, 0])}, "window is (-2, 0)"),
            ({"window": np.array([1.5, 2])}, "array or value window"),
            ({"other.sinks": np.zeros(4)}, "other.sinks, which only counts beside"),
        ],
    )
    def test_bad_ones(self, tmp_path: Path, capsys: Any, wrong: Any, said: str) -> None:
        path = saved(tmp_path, **self.tensors(), **wrong)
        refused(path, capsys, said)
        if "maybe" not in said:
            convert(path, "--ignore", next(iter(wrong)).rpartition(".")[2])
            problem = problem_of(path.with_name("converted.h5"))
            assert (problem.sinks, problem.segments, problem.window) == (False, (), (-1, -1))

    def test_in_hdf5_above_the_items(self, tmp_path: Path, capsys: Any) -> None:
        write_dataset(tmp_path / "o.h5", {"a": self.tensors()})
        with h5py.File(tmp_path / "o.h5", "a") as file:
            file["sinks"] = self.SINKS
        refused(tmp_path / "o.h5", capsys, "dataset sinks, which only counts in an item")
        convert(tmp_path / "o.h5", "--ignore", "sinks")


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
