"""Engines on disk: vouched for, or not run; and the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mdattn_mpi.errors import DeviceError, MdattnError, RejectedError
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.trt.choice import spec_for
from mdattn_mpi.trt.library import Library
from mdattn_mpi.trt.spec import EngineSpec, Extent
from mdattn_mpi.trt.store import (
    Cache,
    Manifest,
    check_fits,
    describe,
    manifest_path,
    read_engine,
    sha256_of,
    write_engine,
)

RTX = Library("tensorrt_rtx", "1.7.1.116", SimpleNamespace())
SPEC = EngineSpec(
    "allgather", 2, 8, 2, 64, "bfloat16", "none", 0.125,
    Extent(1, 9, 9), Extent(1, 9, 9), Extent(1, 18, 18),
)  # fmt: skip
ENGINE = bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "attn.engine"
    write_engine(path, ENGINE, describe(ENGINE, RTX, (8, 6), SPEC))
    return path


def test_round_trip(path: Path) -> None:
    engine, manifest = read_engine(path)
    assert engine == ENGINE
    assert manifest.attention() == SPEC
    assert (manifest.sm, manifest.ranks, manifest.size) == ((8, 6), 2, len(ENGINE))
    assert manifest.sha256 == sha256_of(ENGINE)
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_one_flipped_bit_is_refused(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RejectedError, match="SHA-256") as caught:
        read_engine(path)
    assert caught.value.file == str(path)
    path.write_bytes(ENGINE[:-1])
    with pytest.raises(RejectedError, match="changed or is incomplete"):
        read_engine(path)


def test_without_a_manifest_it_is_refused(path: Path) -> None:
    manifest_path(path).unlink()
    with pytest.raises(RejectedError, match="native code") as caught:
        read_engine(path)
    assert "--adopt" in caught.value.fix


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="cannot read the engine: No such file"):
        read_engine(tmp_path / "none.engine")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"format": "mdattn-engine", "format_version": 9}',
        "{" * 2000,
        "\xff",
    ],
)
def test_what_is_no_manifest(path: Path, text: str) -> None:
    manifest_path(path).write_bytes(text.encode("latin1"))
    with pytest.raises(RejectedError, match="not an engine manifest"):
        read_engine(path)


@pytest.mark.parametrize("field", ["sha256", "sm", "ranks", "spec", "strategy"])
def test_a_manifest_without_a_field(path: Path, field: str) -> None:
    fields = json.loads(manifest_path(path).read_text())
    del fields[field]
    manifest_path(path).write_text(json.dumps(fields))
    with pytest.raises(RejectedError, match="not an engine manifest"):
        read_engine(path)


def test_what_does_not_fit(path: Path) -> None:
    _, manifest = read_engine(path)
    check_fits(manifest, RTX, (8, 6), 2, "attn.engine")
    newer = Library("tensorrt_rtx", "1.8.0", SimpleNamespace())
    full = Library("tensorrt", "11.0", SimpleNamespace())
    cases: list[tuple[Library, tuple[int, int], int, str, type[MdattnError], int]] = [
        (newer, (8, 6), 2, "built by tensorrt_rtx 1.7.1.116, here is", RejectedError, 2),
        (full, (8, 6), 2, "here is tensorrt 11.0", RejectedError, 2),
        (RTX, (8, 6), 4, "for 2 ranks, this group has 4", RejectedError, 2),
        (RTX, (9, 0), 2, "for SM 8.6, this GPU has SM 9.0", DeviceError, 4),
    ]
    for library, sm, ranks, told, kind, code in cases:
        with pytest.raises(kind, match=told) as caught:
            check_fits(manifest, library, sm, ranks, "attn.engine")
        assert caught.value.exit_code == code
        assert caught.value.fix


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    manifest = describe(ENGINE, RTX, (8, 6), SPEC)
    with pytest.raises(RejectedError, match="cannot write the engine"):
        write_engine(tmp_path / "none" / "attn.engine", ENGINE, manifest)


def test_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "a" / "engines")
    assert cache.get("key") is None
    manifest = describe(ENGINE, RTX, (8, 6), SPEC)
    cache.put("key", ENGINE, manifest)
    assert cache.get("key") == (ENGINE, manifest)
    assert cache.get("other") is None
    (engine,) = cache.folder.glob("*.engine")
    engine.write_bytes(ENGINE[::-1])
    assert cache.get("key") is None, "a damaged engine is built again"
    cache.put("key", ENGINE, manifest)
    assert cache.get("key") is not None
    cache.folder.chmod(0o777)
    assert cache.get("key") is None, "others may have put it there"


def test_a_manifest_in_the_cache_names_no_other_path(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    tmp_path.chmod(0o700)
    manifest = describe(ENGINE, RTX, (8, 6), SPEC)
    cache.put("key", ENGINE, manifest)
    assert cache.get("key") == (ENGINE, manifest)
    fields = json.loads(manifest.to_json())
    (listed,) = tmp_path.glob("*.json")
    listed.write_text(json.dumps({**fields, "sha256": "../../etc/passwd"}))
    assert cache.get("key") is None


def test_a_cache_that_cannot_be_written_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "engines")
    cache.put("key", ENGINE, describe(ENGINE, RTX, (8, 6), SPEC))
    assert cache.get("key") is None


def test_the_key_of_a_spec_is_all_of_it() -> None:
    problem = AttentionProblem(64, 64, 8, 2, 64, 64, "bfloat16", "upper_left")
    digests = {
        spec.digest
        for strategy in ("allgather", "ulysses")
        for ranks in (1, 2)
        for changes in ({}, {"dtype": "float16"}, {"scale": 0.5}, {"causal": "none"})
        for spec in spec_for([_changed(problem, changes)], strategy, ranks)  # type: ignore[arg-type]
    }
    assert len(digests) == 16
    (spec,) = spec_for([problem], "ulysses", 2)
    assert EngineSpec.from_facts(json.loads(json.dumps(spec.facts()))) == spec


def _changed(problem: AttentionProblem, changes: dict[str, object]) -> AttentionProblem:
    from dataclasses import replace

    return replace(problem, **changes)  # type: ignore[arg-type]


def test_manifest_reads_back(path: Path) -> None:
    _, manifest = read_engine(path)
    assert Manifest.from_json(manifest.to_json(), path) == manifest
