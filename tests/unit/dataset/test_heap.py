"""Text attributes: read without HDF5, the same as by HDF5, and harmless when damaged."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import h5py
import pytest

from mdattn_mpi.dataset.hdf5 import File
from mdattn_mpi.dataset.heap import text_attribute
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


def test_damage_is_an_error_or_other_text(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.attrs["causal"] = "upper_left"
        header = h5py.h5o.get_info(file.id).addr
    content = path.read_bytes()
    heap = content.index(b"GCOL")
    message = content.index(b"causal")
    draw = random.Random(0)
    outcomes = set()
    with open(path, "r+b", buffering=0) as raw:
        for place in (*range(header, header + 64), *range(message - 8, message + 80)):
            for other in (content[place] ^ 1 << draw.randrange(8), 0xFF, 0):
                outcomes.add(attempt(raw, header, place, other, content[place]))
        for place in range(heap, heap + 64):
            for other in (content[place] ^ 1 << draw.randrange(8), 0xFF, 0):
                outcomes.add(attempt(raw, header, place, other, content[place]))
    assert outcomes == {"read", "ValueError"}


def attempt(raw: Any, header: int, place: int, other: int, right: int) -> str:
    """Read with one byte changed, then change it back."""
    raw.seek(place)
    raw.write(bytes([other]))
    try:
        text_attribute(raw.fileno(), 0, header, b"causal", 1 << 20)
        return "read"
    except ValueError:
        return "ValueError"
    finally:
        raw.seek(place)
        raw.write(bytes([right]))
