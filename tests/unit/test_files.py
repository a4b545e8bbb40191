"""Files that appear whole or not at all, and the folders for what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdattn_mpi.files import cache_folder, is_private, whole_file, write_whole


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ("one", "two"):
        write_whole(path, content)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.o"
    write_whole(path, b"whole")

    def fail() -> None:
        with whole_file(path) as new:
            assert new.suffix == ".o"
            new.write_bytes(b"ha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="x"):
        write_whole(tmp_path / "x", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_cache_stands_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MDATTN_CACHE", raising=False)
    assert cache_folder("flash") == tmp_path / "mdattn" / "flash"
    monkeypatch.setenv("MDATTN_CACHE", str(tmp_path / "own"))
    assert cache_folder("flash") == tmp_path / "own" / "flash"


def test_who_may_write(tmp_path: Path) -> None:
    for mode, private in ((0o700, True), (0o755, True), (0o775, False), (0o757, False)):
        tmp_path.chmod(mode)
        assert is_private(tmp_path) is private
