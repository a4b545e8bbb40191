"""Reading shards: every way to store them gives the same bits."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.dataset import Dataset, open_dataset
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import Span
from tests.support.dataset_files import (
    BFLOAT16,
    FLOAT16,
    How,
    random_tensors,
    same_bits,
    write_dataset,
)

CHUNKED: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunked": {"chunks": True},
    "gzip": {"chunks": True, "compression": "gzip"},
    "all filters": {"chunks": True, "compression": 9, "shuffle": True, "fletcher32": True},
    "shuffle": {"chunks": True, "shuffle": True},
    "fletcher32": {"chunks": True, "fletcher32": True},
    "lzf": {"chunks": True, "compression": "lzf"},
}


def how(encoding: str, layout: str, storage: str, dims: int) -> How:
    """A way to store, with chunks that divide nothing evenly."""
    keywords = dict(CHUNKED[storage])
    if "chunks" in keywords:
        keywords["chunks"] = ((1, 2, 5, 7) if layout == "head_major" else (1, 5, 1, 7))[-dims:]
    return How(encoding, layout, keywords)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
@pytest.mark.parametrize("layout", ["token_major", "head_major"])
@pytest.mark.parametrize("storage", CHUNKED)
@pytest.mark.parametrize("encoding", ["float", "uint16", "opaque", "fp16"])
def test_spans(
    tmp_path: Path, encoding: str, storage: str, layout: str, batch: tuple[int, ...]
) -> None:
    dtype = FLOAT16 if encoding == "fp16" else BFLOAT16
    tensors = random_tensors(dtype=dtype, batch=batch)
    stored = how(encoding, layout, storage, 3 + len(batch))
    if encoding == "opaque" and storage in ("all filters", "shuffle"):
        stored.storage.pop("shuffle", None)
    write_dataset(tmp_path / "a.h5", {"x": tensors}, stored)
    spans = (Span(3, 9), Span(0, 0), Span(11, 23), Span(0, 1))
    with open_dataset(tmp_path / "a.h5") as dataset:
        assert [item.name for item in dataset.items] == (
            [f"x.{entry}" for entry in range(3)] if batch else ["x"]
        )
        assert bool(dataset.warnings) == (layout == "head_major" or storage != "contiguous")
        for entry, item in enumerate(dataset.items):
            for name, whole in tensors.items():
                array = whole[entry] if batch else whole
                cut = np.concatenate([array[span.slice] for span in spans])
                assert same_bits(dataset.read(item, name, spans), cut)


@given(st.data())
def test_any_shape_and_any_spans(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    small = st.integers(1, 9)
    group, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    shape = (
        data.draw(small),
        data.draw(small),
        group * kv_heads,
        kv_heads,
        data.draw(small),
        data.draw(small),
    )
    tensors = random_tensors(shape)
    layout = data.draw(st.sampled_from(["token_major", "head_major"]))
    storage: dict[str, Any] = {"chunks": True} if data.draw(st.booleans()) else {}
    path = tmp_path_factory.mktemp("any") / "a.h5"
    write_dataset(path, {"x": tensors}, How("float", layout, storage))
    with open_dataset(path) as dataset:
        (item,) = dataset.items
        problem = item.problem
        assert (problem.q_tokens, problem.kv_tokens) == shape[:2]
        assert (problem.q_heads, problem.kv_heads) == shape[2:4]
        assert (problem.head_dim, problem.v_head_dim) == shape[4:]
        name = data.draw(st.sampled_from(["query", "key", "value"]))
        array = tensors[name]
        edges = st.integers(0, len(array))
        spans = [Span(*sorted((data.draw(edges), data.draw(edges)))) for _ in range(3)]
        wanted = np.concatenate([array[span.slice] for span in spans])
        assert same_bits(dataset.read(item, name, spans), wanted)


def test_reading_into_an_array_of_the_caller(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_dataset(tmp_path / "a.h5", {"x": tensors})
    with open_dataset(tmp_path / "a.h5") as dataset:
        (item,) = dataset.items
        out = np.zeros((7, 4, 16), BFLOAT16)
        assert dataset.read(item, "query", [Span(30, 37)], out=out) is out
        assert same_bits(out, tensors["query"][30:])
        for bad in (np.zeros((6, 4, 16), BFLOAT16), np.zeros((7, 4, 16), FLOAT16), out[::2]):
            with pytest.raises(ValueError, match="out is"):
                dataset.read(item, "query", [Span(30, 37)], out=bad)
        with pytest.raises(ValueError, match="not within"):
            dataset.read(item, "query", [Span(30, 38)])


def test_several_threads_at_once(tmp_path: Path) -> None:
    tensors = random_tensors((400, 300, 4, 2, 16, 24))
    write_dataset(tmp_path / "a.h5", {"x": tensors})
    write_dataset(tmp_path / "b.h5", {"x": tensors}, how("float", "token_major", "gzip", 3))
    for name in ("a.h5", "b.h5"):
        with open_dataset(tmp_path / name) as dataset, ThreadPoolExecutor(8) as threads:
            (item,) = dataset.items

            def read(start: int, dataset: Dataset = dataset, item: Any = item) -> bool:
                found = dataset.read(item, "query", [Span(start, start + 50)])
                return same_bits(found, tensors["query"][start : start + 50])

            assert all(threads.map(read, range(0, 350, 5)))


def test_mask_and_scale(tmp_path: Path) -> None:
    items = {name: random_tensors() for name in ("a", "b", "c")}
    attributes = {"a": {"causal": "lower_right", "scale": 0.5}, "b": {"causal": np.bytes_(b"none")}}
    write_dataset(tmp_path / "a.h5", items, None, attributes)
    with open_dataset(tmp_path / "a.h5") as dataset:
        assert [item.problem.causal for item in dataset.items] == ["lower_right", "none", "none"]
        assert [item.problem.scale for item in dataset.items] == [0.5, 0.25, 0.25]


def test_the_layout_of_a_file_of_an_item_and_of_the_caller(tmp_path: Path) -> None:
    shape = (6, 6, 6, 6, 6, 6)
    write_dataset(
        tmp_path / "a.h5",
        {"a": random_tensors(shape), "b": random_tensors(shape)},
        How(layout="head_major"),
        {"b": {"layout": "token_major"}},
    )
    layouts = {}
    for option in ("auto", "token_major", "head_major"):
        with open_dataset(tmp_path / "a.h5", layout=option) as dataset:
            layouts[option] = [dataset.tensor(item, "key").layout for item in dataset.items]
    assert layouts == {
        "auto": ["head_major", "token_major"],
        "token_major": ["token_major"] * 2,
        "head_major": ["head_major"] * 2,
    }


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("*", ["a1", "a2", "a10", "b.0", "b.1"]),
        ("a*", ["a1", "a2", "a10"]),
        ("a10, a1", ["a1", "a10"]),
        ("b.1", ["b.1"]),
        ("b.?,a2", ["a2", "b.0", "b.1"]),
        ("*1*", ["a1", "a10", "b.1"]),
    ],
)
def test_selecting_items(tmp_path: Path, select: str, names: list[str]) -> None:
    items = {name: random_tensors() for name in ("a1", "a2", "a10")}
    write_dataset(tmp_path / "a.h5", {**items, "b": random_tensors(batch=(2,))})
    with open_dataset(tmp_path / "a.h5", select=select) as dataset:
        assert [item.name for item in dataset.items] == names
        assert [item.index for item in dataset.items] == list(range(len(names)))


def test_an_item_that_is_not_there_is_named_with_those_close_to_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.h5", {"layer0": random_tensors()})
    with pytest.raises(RejectedError, match=r"no item matches 'layr0'.*did you mean layer0"):
        open_dataset(tmp_path / "a.h5", select="layr0")
    with pytest.raises(RejectedError, match="no item is selected"):
        open_dataset(tmp_path / "a.h5", select=" , ")


def test_an_item_called_like_an_entry_of_a_batch_is_refused(tmp_path: Path) -> None:
    items = {"a": random_tensors(batch=(2,)), "a.1": random_tensors()}
    write_dataset(tmp_path / "a.h5", items)
    with pytest.raises(RejectedError, match=r"two items are called 'a\.1'"):
        open_dataset(tmp_path / "a.h5")


class TestBadInput:
    """One message that names file, item, value and fix."""

    def items(self) -> dict[str, dict[str, Any]]:
        return {"good": random_tensors(), "bad": random_tensors()}

    def refused(self, path: Path, said: str, item: str = "bad") -> None:
        """The file is refused because of one item; without that item it is not."""
        with pytest.raises(RejectedError, match=said) as caught:
            open_dataset(path)
        assert caught.value.file == str(path)
        assert caught.value.item == item
        assert caught.value.fix
        with open_dataset(path, select="good") as dataset:
            assert [i.name for i in dataset.items] == ["good"]
        with open_dataset(path, keep_faults=True) as dataset:
            assert [i.name for i in dataset.items] == ["good"]
            assert [fault.item for fault in dataset.faults] == [item]

    def write(self, path: Path, **tensors: Any) -> Path:
        items = self.items()
        items["bad"].update(tensors)
        write_dataset(path / "a.h5", items)
        return path / "a.h5"

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        with h5py.File(path, "a") as file:
            del file["items/bad/value"]
        self.refused(path, "no dataset 'value'")

    def test_a_dataset_in_place_of_an_item(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        with h5py.File(path, "a") as file:
            del file["items/bad"]
            file["items/bad"] = 1.0
        self.refused(path, "isn't a group")

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            ({"value": np.zeros((22, 2, 24), BFLOAT16)}, "key and value disagree"),
            ({"key": np.zeros((23, 2, 8), BFLOAT16)}, "head dims disagree: query 16, key 8"),
            ({"query": np.zeros((37, 5, 16), BFLOAT16)}, "5 query heads are no multiple of 2"),
            ({"query": np.zeros((0, 4, 16), BFLOAT16)}, "q_tokens is 0"),
            ({"query": np.zeros((37, 4, 16), FLOAT16)}, "dtypes disagree: query float16"),
            ({"query": np.zeros((37, 4, 16), np.float32)}, "a float of 4 bytes"),
            ({"query": np.zeros((37, 4, 16), np.uint16)}, "no attribute dtype"),
            ({"query": np.zeros((37, 4, 16), ">f2")}, "big-endian"),
            ({"query": np.zeros((37, 64), BFLOAT16)}, r"shape \[37, 64\]"),
            ({"query": np.zeros((2, 37, 4, 16), BFLOAT16)}, "batch dims disagree"),
            ({"value": np.zeros((23, 2, 257), BFLOAT16)}, "v_head_dim is 257"),
        ],
    )
    def test_tensors_that_do_not_fit(self, tmp_path: Path, tensors: Any, said: str) -> None:
        self.refused(self.write(tmp_path, **tensors), said)

    @pytest.mark.parametrize(
        ("attribute", "value", "said"),
        [
            ("causal", "yes", "causal is 'yes'"),
            ("causal", 1, "causal is '1'"),
            ("scale", -1.0, r"scale is -1\.0"),
            ("scale", float("nan"), "scale is nan"),
            ("scale", float("inf"), "scale is inf"),
            ("scale", 0, "scale is 0"),
            ("scale", "big", "scale is 'big'"),
            ("scale", [1.0, 2.0], "neither text nor one number"),
            ("layout", "fortran", "layout is 'fortran'"),
        ],
    )
    def test_attributes(self, tmp_path: Path, attribute: str, value: Any, said: str) -> None:
        write_dataset(tmp_path / "a.h5", self.items(), None, {"bad": {attribute: value}})
        self.refused(tmp_path / "a.h5", said)

    def test_several_bad_items_are_counted(self, tmp_path: Path) -> None:
        items = {name: random_tensors() for name in "abc"}
        bad = {name: {"scale": -1.0} for name in "ab"}
        write_dataset(tmp_path / "a.h5", items, None, bad)
        with pytest.raises(RejectedError, match="1 more items are bad"):
            open_dataset(tmp_path / "a.h5")

    @pytest.mark.parametrize(
        ("format_", "version", "said"),
        [
            (None, 1, "no attribute format"),
            ("other", 1, "format is 'other'"),
            ("mdattn-output", 1, "format is 'mdattn-output'"),
            ("mdattn-dataset", 2, "version is 2"),
            ("mdattn-dataset", None, "version is None"),
        ],
    )
    def test_format_and_version(
        self, tmp_path: Path, format_: str | None, version: int | None, said: str
    ) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for name, value in (("format", format_), ("version", version)):
                if value is not None:
                    file.attrs[name] = value
        with pytest.raises(RejectedError, match=said) as caught:
            open_dataset(tmp_path / "a.h5")
        assert caught.value.fix

    def test_no_items(self, tmp_path: Path) -> None:
        write_dataset(tmp_path / "a.h5", {})
        with pytest.raises(RejectedError, match="no group /items"):
            open_dataset(tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file.create_group("items")
        with pytest.raises(RejectedError, match="/items is empty"):
            open_dataset(tmp_path / "a.h5")

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("hello")
        (tmp_path / "empty").write_bytes(b"")
        os.mkfifo(tmp_path / "pipe")
        for name, said in (
            ("nothing", "No such file"),
            ("text", "not an HDF5 file"),
            ("empty", "not an HDF5 file"),
            (".", "is a folder"),
            ("pipe", "no regular file"),
            ("a\0b", "null"),
        ):
            with pytest.raises(RejectedError, match=said):
                open_dataset(f"{tmp_path}/{name}")

    def test_a_file_cut_while_it_is_open(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        with open_dataset(path) as dataset:
            os.truncate(path, 3000)
            with pytest.raises(ItemError, match="was cut while open") as caught:
                dataset.read(dataset.items[1], "value", [Span(0, 23)])
            assert caught.value.item == "good"
            assert caught.value.file == str(path)

    def test_a_damaged_chunk(self, tmp_path: Path) -> None:
        tensors = random_tensors()
        checked = how("float", "token_major", "all filters", 3)
        write_dataset(tmp_path / "a.h5", {"a": tensors}, checked)
        with h5py.File(tmp_path / "a.h5") as file:
            where = file["items/a/key"].id.get_chunk_info(3).byte_offset
        with open(tmp_path / "a.h5", "r+b") as file:
            file.seek(where + 10)
            file.write(b"\x55\xaa")
        with open_dataset(tmp_path / "a.h5") as dataset:
            with pytest.raises(ItemError, match="chunk"):
                dataset.read(dataset.items[0], "key", [Span(0, 23)])
            whole = dataset.read(dataset.items[0], "query", [Span(0, 37)])
            assert same_bits(whole, tensors["query"])


class TestDigest:
    """The digest names the content, not the file."""

    def digest(self, path: Path, **options: Any) -> str:
        with open_dataset(path, **options) as dataset:
            assert dataset.identity["input_digest"] == dataset.digest
            return dataset.digest

    def test_a_copy_has_the_same(self, tmp_path: Path) -> None:
        items = {"a": random_tensors()}
        write_dataset(tmp_path / "a.h5", items)
        write_dataset(tmp_path / "b.h5", items)
        assert self.digest(tmp_path / "a.h5") == self.digest(tmp_path / "b.h5")

    def test_other_content_has_another(self, tmp_path: Path) -> None:
        tensors = random_tensors()
        write_dataset(tmp_path / "a.h5", {"a": tensors})
        digests = {self.digest(tmp_path / "a.h5")}
        tensors["value"][-1, -1, -1] = np.float32(1.0)
        tensors["value"][0, 0, 0] = np.float32(2.0)
        write_dataset(tmp_path / "a.h5", {"a": tensors})
        digests.add(self.digest(tmp_path / "a.h5"))
        write_dataset(tmp_path / "a.h5", {"b": tensors})
        digests.add(self.digest(tmp_path / "a.h5"))
        write_dataset(tmp_path / "a.h5", {"b": tensors}, None, {"b": {"causal": "upper_left"}})
        digests.add(self.digest(tmp_path / "a.h5"))
        assert len(digests) == 4

    def test_it_is_of_the_selected_items(self, tmp_path: Path) -> None:
        write_dataset(tmp_path / "a.h5", {"a": random_tensors(), "b": random_tensors()})
        both = self.digest(tmp_path / "a.h5")
        assert self.digest(tmp_path / "a.h5", select="a") != both

    def test_large_files_are_sampled_at_both_ends(self, tmp_path: Path) -> None:
        shape = (20_000, 300, 1, 1, 64, 64)
        tensors = random_tensors(shape)
        seen = set()
        for row in (0, len(tensors["query"]) - 1):
            tensors["query"][row] = np.float32(row + 1)
            write_dataset(tmp_path / "a.h5", {"a": tensors})
            seen.add(self.digest(tmp_path / "a.h5"))
        assert len(seen) == 2

    def test_many_items_share_the_samples(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mdattn_mpi.dataset.tensors.SAMPLES", 10)
        items = {f"i{n}": random_tensors((2, 2, 1, 1, 4, 4)) for n in range(20)}
        write_dataset(tmp_path / "a.h5", items)
        before = self.digest(tmp_path / "a.h5")
        items["i0"]["query"] += np.float32(1.0)
        write_dataset(tmp_path / "a.h5", items)
        assert self.digest(tmp_path / "a.h5") != before
