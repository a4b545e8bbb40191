"""What the format doesn't know is refused by name; what libraries add of their own accord isn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.dataset import open_dataset
from mdattn_mpi.errors import RejectedError
from tests.support.dataset_files import FLOAT16, random_tensors, write_dataset


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "d.h5", {"a": random_tensors(dtype=FLOAT16)})
    return tmp_path / "d.h5"


def attribute(place: str, name: str, value: Any = 1) -> Any:
    def edit(file: h5py.File) -> None:
        file[place].attrs[name] = value

    return edit


def dataset(name: str) -> Any:
    def edit(file: h5py.File) -> None:
        file[f"items/a/{name}"] = np.arange(4)

    return edit


@pytest.mark.parametrize(
    ("edit", "name", "said"),
    [
        (attribute("items/a", "sliding_window"), "sliding_window", "attribute sliding_window"),
        (attribute("items/a", "Softcap", 30.0), "Softcap", "attribute Softcap"),
        (attribute("items/a", "is_causal", True), "is_causal", "attribute is_causal"),
        (attribute("items/a", "Scale", 0.5), "Scale", "attribute Scale"),
        (attribute("items/a/key", "scale_factor"), "scale_factor", "scale_factor of key"),
        (dataset("cu_seqlens"), "cu_seqlens", "dataset cu_seqlens"),
        (dataset("s_aux"), "s_aux", "dataset s_aux"),
        (lambda file: file.create_group("items/a/more"), "more", "dataset more"),
        (attribute("/", "causal", "upper_left"), "causal", "attribute causal, which only counts"),
        (attribute("items", "scale", 0.5), "scale", "attribute scale, which only counts"),
        (attribute("/", "window"), "window", "attribute window, which only counts"),
    ],
)
def test_it_is_refused_by_name(path: Path, edit: Any, name: str, said: str) -> None:
    with open_dataset(path) as opened:
        right = opened.items
    with h5py.File(path, "a") as file:
        edit(file)
    with pytest.raises(RejectedError, match=said) as caught:
        open_dataset(path)
    assert f"--ignore {name}" in caught.value.fix
    with pytest.raises(RejectedError, match=said):
        open_dataset(path, ignore=("other",))
    with open_dataset(path, ignore=("other", name)) as opened:
        assert opened.items == right


def test_all_of_it_in_one_message(path: Path) -> None:
    with h5py.File(path, "a") as file:
        attribute("items/a", "slopes")(file)
        dataset("s_aux")(file)
    with pytest.raises(RejectedError, match="attribute slopes, dataset s_aux") as caught:
        open_dataset(path)
    assert "--ignore slopes,s_aux" in caught.value.fix


def test_what_is_known_is_never_ignored(path: Path) -> None:
    with h5py.File(path, "a") as file:
        attribute("items/a", "scale", 0.5)(file)
    with open_dataset(path, ignore=("scale",)) as opened:
        assert opened.items[0].problem.scale == 0.5


def test_what_libraries_add(path: Path) -> None:
    with h5py.File(path, "a") as file:
        item = file["items/a"]
        item["tokens"] = np.arange(37)
        item["tokens"].make_scale("tokens")
        item["query"].dims[0].attach_scale(item["tokens"])
        item["query"].dims[0].label = "tokens"
        item["key"].attrs["units"] = item.attrs["description"] = "text"
        item.attrs["TITLE"] = item.attrs["CLASS"] = "GROUP"
        file.attrs["creator"] = file.attrs["anything"] = "somebody"
        file["notes/of/mine"] = 1
    with open_dataset(path) as opened:
        assert [item.name for item in opened.items] == ["a"]


def test_an_item_that_is_not_selected_may_hold_anything(tmp_path: Path) -> None:
    items = {"a": random_tensors(), "b": random_tensors()}
    write_dataset(tmp_path / "d.h5", items, None, {"b": {"window": 3}})
    with open_dataset(tmp_path / "d.h5", select="a") as opened:
        assert [item.name for item in opened.items] == ["a"]
    with open_dataset(tmp_path / "d.h5", keep_faults=True) as opened:
        assert [fault.item for fault in opened.faults] == ["b"]
