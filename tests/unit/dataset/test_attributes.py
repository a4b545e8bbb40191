"""Attributes in every format of HDF5 files: text, numbers, and what is neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import pytest

from mdattn_mpi.dataset.hdf5 import File
from mdattn_mpi.errors import RejectedError


@pytest.mark.parametrize("block", [0, 512])
@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "latest"])
@pytest.mark.parametrize("ordered", [False, True])
def test_text_in_every_format(
    tmp_path: Path, libver: str, count: int, block: int, ordered: bool
) -> None:
    texts = {f"name{n}": "wört " * n for n in range(count)}
    options: dict[str, Any] = {"libver": libver, "userblock_size": block, "track_order": ordered}
    with h5py.File(tmp_path / "a.h5", "w", **options) as file:
        file.create_group("g", track_order=ordered).attrs.update(texts)
        file.attrs.update(texts)
    with File(tmp_path / "a.h5") as opened:
        group = opened.root.child("g")
        assert group is not None
        for node in (opened.root, group):
            assert node.attributes() == texts
            assert node.attribute("other") is None


def test_fixed_text_and_numbers(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs.create("fixed", "é".encode(), dtype=h5py.string_dtype("utf-8", 5))
        file.attrs["integer"] = 3
        file.attrs["real"] = 0.5
        file.attrs["one"] = [7]
        file.attrs["several"] = [1, 2]
        file.attrs["reference"] = file.ref
    with File(tmp_path / "a.h5") as opened:
        assert opened.root.attributes() == {"fixed": "é", "integer": 3, "real": 0.5, "one": 7}
        for name in ("several", "reference"):
            with pytest.raises(RejectedError, match="neither text nor one number"):
                opened.root.attribute(name)
