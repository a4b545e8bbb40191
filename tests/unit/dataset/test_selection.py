"""Which items a pattern selects: the exact name first."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdattn_mpi.dataset import open_dataset
from mdattn_mpi.dataset.index import chosen_names
from mdattn_mpi.errors import RejectedError
from tests.support.dataset_files import random_tensors, write_dataset


def selected(path: Path, select: str) -> list[str]:
    with open_dataset(path, select=select) as dataset:
        return [item.name for item in dataset.items]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["a[1]"], {"a[1]"}),
        (["a[2]"], {"a2"}),  # nobody's name, so a glob
        (["a[1]", "a1"], {"a[1]", "a1"}),
        (["a?"], {"a?"}),
        (["a*"], {"a[1]", "a1", "a2", "a?", "a"}),
        (["*"], {"a[1]", "a1", "a2", "a?", "a", "*"}),  # all, even if one is called so
        (["[*]"], {"*"}),
    ],
)
def test_names_and_globs(patterns: list[str], wanted: set[str]) -> None:
    names = {"a[1]", "a1", "a2", "a?", "a", "*"}
    assert chosen_names(names, patterns, "f") == wanted
    with pytest.raises(RejectedError, match="no item matches 'b'"):
        chosen_names(names, [*patterns, "b"], "f")


def test_items_of_a_dataset(tmp_path: Path) -> None:
    items = {name: random_tensors() for name in ("a1", "a[1]", "ab")}
    items["b[1]"], items["b1"] = random_tensors(batch=(2,)), random_tensors()
    write_dataset(tmp_path / "d.h5", items)
    assert selected(tmp_path / "d.h5", "a[1]") == ["a[1]"]
    assert selected(tmp_path / "d.h5", "a[b]") == ["ab"]
    assert selected(tmp_path / "d.h5", "b[1]") == ["b[1].0", "b[1].1"]
    assert selected(tmp_path / "d.h5", "b[1].1") == ["b[1].1"]
    assert selected(tmp_path / "d.h5", "b*1") == ["b1", "b[1].1"]


def test_an_item_with_a_fault_is_still_the_one_that_was_meant(tmp_path: Path) -> None:
    items = {name: random_tensors() for name in ("a1", "a[1]")}
    write_dataset(tmp_path / "d.h5", items, None, {"a[1]": {"scale": -1.0}})
    with pytest.raises(RejectedError, match=r"'a\[1\]'.*scale is -1"):
        open_dataset(tmp_path / "d.h5", select="a[1]")
    assert selected(tmp_path / "d.h5", "a1") == ["a1"]


@pytest.mark.parametrize(("length", "batch", "good"), [(198, 10, True), (198, 11, False)])
def test_names_of_batch_entries(tmp_path: Path, length: int, batch: int, good: bool) -> None:
    """An output has an item a batch entry; a name that is too long couldn't be opened again."""
    write_dataset(tmp_path / "d.h5", {"x" * length: random_tensors(batch=(batch,))})
    if good:
        assert len(selected(tmp_path / "d.h5", "*")) == batch
    else:
        with pytest.raises(RejectedError, match="the name of its last entry has 201 characters"):
            open_dataset(tmp_path / "d.h5")
