"""Damaged files: every change is detected, listed, or without effect; nothing crashes or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.cli import main as mdattn
from mdattn_mpi.dataset import Item, Output, create_output, open_dataset, open_output
from mdattn_mpi.dataset.layout import TENSORS
from mdattn_mpi.errors import MdattnError
from mdattn_mpi.partition import partition
from mdattn_mpi.problem import Span
from tests.support.corruption import look_at_dataset, look_at_output, regions
from tests.support.dataset_files import FLOAT16, How, random_tensors, write_dataset
from tests.support.group import take

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 1 MB, with checksums."""
    path = tmp_path_factory.mktemp("corruption") / "data.h5"
    shape = "--items 3 --lengths 300:400 --q-heads 4 --kv-heads 2 --head-dim 64"
    assert mdattn(["make-data", str(path), *shape.split()]) == 0
    assert 0.7e6 < path.stat().st_size < 1.5e6
    return path


@pytest.fixture(scope="module")
def output(dataset: Path) -> Path:
    """A finished output of 1 MB."""
    path = dataset.with_name("out.h5")
    draw = np.random.default_rng()
    with open_dataset(dataset) as data:
        create_output(path, data.items, ranks=3, lse=True, attributes={**data.identity, "x": "é"})
    with open_output(path, writable=True) as opened:
        for item in opened.items:
            problem = item.problem
            shards = partition(problem, "ring", 3).query
            shape = (problem.q_tokens, problem.q_heads, problem.v_head_dim)
            out = draw.standard_normal(shape).astype(opened.read(item, "output", ()).dtype)
            sums = draw.standard_normal(shape[:2]).astype(np.float32)
            crc32s = [
                opened.write(item, s, {"output": take(out, s), "lse": take(sums, s)})
                for s in shards
            ]
            opened.ledger.commit(item, crc32s, "ring", shards)
    return path


def corrupt(kind: str, path: Path, metadata_step: int, data_step: int) -> dict[str, Any]:
    """Run `tests.support.corruption` on a copy."""
    copy = path.with_name(f"{kind}-copy.h5")
    copy.write_bytes(path.read_bytes())
    steps = [str(metadata_step), str(data_step)]
    command = [sys.executable, "-m", "tests.support.corruption", kind, str(copy), *steps]
    try:
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=110, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs, or is too slow, at {Path(f'{copy}.at').read_text()}")
    assert not result.returncode, f"{result.stderr} at {Path(f'{copy}.at').read_text()}"
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.parametrize("kind", ["dataset", "output"])
def test_metadata_and_some_of_the_data(kind: str, request: pytest.FixtureRequest) -> None:
    """The whole file is opened and read anew after each change."""
    path = request.getfixturevalue(kind)
    report = corrupt(kind, path, 19, 97 * 97)
    assert report["unnoticed"] == []
    assert report["outcomes"]["detected"] > 20
    assert report["outcomes"]["listed"] > 50


def test_every_97th_byte_of_the_data_of_a_dataset(dataset: Path, tmp_path: Path) -> None:
    """Contents have no part in opening the file; each of their bytes counts in a checksum."""
    path = tmp_path / "data.h5"
    path.write_bytes(dataset.read_bytes())
    changes = 0
    with open_dataset(path) as opened, open(path, "r+b", buffering=0) as file:
        for item in opened.items:
            for name in TENSORS:
                data = opened.tensor(item, name)
                assert data.region is not None
                for offset in range(data.region.offset, data.region.stop, 97):
                    with changed(file, offset):
                        assert opened.checksum(item, name) != data.crc32
                        changes += 1
                assert opened.checksum(item, name) == data.crc32
    assert changes > 7000


def test_every_97th_byte_of_the_data_of_an_output(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    path.write_bytes(output.read_bytes())
    changes = 0
    with open_output(path) as opened, open(path, "r+b", buffering=0) as file:
        for item in opened.items:
            for start, stop in places_of(path, item):
                for offset in range(start, stop, 97):
                    with changed(file, offset):
                        assert not sound(opened, item)
                        changes += 1
            assert sound(opened, item)
    assert changes > 3000


def places_of(path: Path, item: Item) -> list[tuple[int, int]]:
    """Where an item's results are."""
    with h5py.File(path, locking=False) as file:
        results = [node.id for node in file["items"][item.name].values()]
        return [
            (node.get_offset(), node.get_offset() + node.get_storage_size()) for node in results
        ]


def sound(output: Output, item: Item) -> bool:
    """Whether all shards match their checksums."""
    entry = output.ledger.entry(item)
    return entry.state == "done" and all(
        output.checksum(item, spans) == crc32
        for spans, crc32 in zip(entry.shards, entry.crc32s, strict=True)
    )


@contextmanager
def changed(file: Any, offset: int) -> Iterator[None]:
    """Another byte at `offset`, for as long as the block lasts."""
    right = os.pread(file.fileno(), 1, offset)
    os.pwrite(file.fileno(), bytes([right[0] ^ 1 << offset % 8]), offset)
    yield
    os.pwrite(file.fileno(), right, offset)


@pytest.mark.parametrize("storage", ["contiguous", "gzip"])
def test_files_that_plain_h5py_made(tmp_path: Path, storage: str) -> None:
    """Metadata without checksums, chunks: nothing crashes, hangs, or needs much memory."""
    options = {"chunks": (5, 1, 4), "compression": "gzip", "fletcher32": True}
    how = How(storage=options if storage == "gzip" else {})
    tensors = random_tensors((9, 7, 2, 1, 8, 8), dtype=FLOAT16)
    path = tmp_path / "a.h5"
    write_dataset(path, {"x": tensors}, how, {"x": {"causal": "upper_left", "scale": 0.5}})
    report = corrupt("plain", path, 31, 97)
    assert report["outcomes"]["detected"] > 5


class TestTruncated:
    """Cut at every structural boundary, and beside it."""

    @pytest.mark.parametrize("kind", ["dataset", "output"])
    def test_at_every_boundary(self, kind: str, request: pytest.FixtureRequest) -> None:
        path = request.getfixturevalue(kind)
        content = path.read_bytes()
        cut = path.with_name("cut.h5")
        opener = open_dataset if kind == "dataset" else open_output
        boundaries = structure(path)
        assert len(boundaries) > 15
        for boundary in boundaries:
            for length in {boundary - 1, boundary, boundary + 1}:
                if not 0 <= length < len(content):
                    continue
                cut.write_bytes(content[:length])
                with pytest.raises(MdattnError) as caught:
                    opener(cut)
                assert str(cut) in str(caught.value)


def structure(path: Path) -> list[int]:
    """Where the parts of a file begin and end: superblock, headers, contents, the end."""
    found = {0, 8, 12, 48, 96, path.stat().st_size}

    def visit(_: str, node: Any) -> None:
        found.add(h5py.h5o.get_info(node.id).addr)
        if isinstance(node, h5py.Dataset):
            start = node.id.get_offset()
            found.update((start, start + node.id.get_type().get_size() * node.size))

    with h5py.File(path) as file:
        file.visititems(visit)
        found.add(h5py.h5o.get_info(file.id).addr)
    return sorted(found)


class TestExchanged:
    """Data that is sound, but not where it belongs."""

    def test_tensors_of_a_dataset(self, dataset: Path) -> None:
        path = dataset.with_name("swapped.h5")
        path.write_bytes(dataset.read_bytes())
        with h5py.File(path, "a") as file:
            file["items/item0"].move("key", "other")
            file["items/item0"].move("value", "key")
            file["items/item0"].move("other", "value")
        assert look_at_dataset(str(path))[1] == ["item0", "item0"]
        assert mdattn(["inspect", str(path), "--check"]) == 1

    def test_results_of_an_output(self, output: Path, tmp_path: Path) -> None:
        path = tmp_path / "out.h5"
        path.write_bytes(output.read_bytes())
        with open_output(path, writable=True) as opened:
            item = opened.items[1]
            out, sums = opened.read(item, "output"), opened.read(item, "lse")
            tokens = [Span(0, item.problem.q_tokens)]
            opened.write(item, tokens, {"output": np.ascontiguousarray(out[::-1]), "lse": sums})
        assert look_at_output(str(path))[1] == ["item1"]
        assert mdattn(["inspect", str(path), "--check"]) == 1
        assert mdattn(["inspect", str(path)]) == 0

    @pytest.mark.parametrize("fill", [np.nan, 0.0])
    def test_filled(self, output: Path, dataset: Path, tmp_path: Path, fill: float) -> None:
        for source, look in ((output, look_at_output), (dataset, look_at_dataset)):
            path = tmp_path / source.name
            content = bytearray(source.read_bytes())
            start, stop = max(regions(str(source)), key=lambda region: region[1] - region[0])
            bits = np.full((stop - start) // 2, fill, np.float32).astype(">f4").view(np.uint16)
            content[start:stop] = bits[: (stop - start) // 2].tobytes()
            path.write_bytes(content)
            assert len(look(str(path))[1]) == 1
