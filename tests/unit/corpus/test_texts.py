"""Texts of files: found, named, and refused with file, line, value and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.corpus.texts import Reading, read_texts
from mdattn_mpi.errors import RejectedError


def texts(path: Path, content: str | bytes, **how: Any) -> list[tuple[str, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(read_texts([str(path)], Reading(**how)))
    assert sum(text.nbytes for text in found) <= path.stat().st_size
    return [(text.name, text.text) for text in found]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = '{"text": "one", "body": "x", "id": "first"}'
    second = '{"text": "zwei ☃", "body": "y", "id": 7}'
    content = f"\ufeff{first}\r\n\n{second}"
    assert texts(path, content) == [("a-1", "one"), ("a-3", "zwei ☃")]
    assert texts(path, content, field="body", id="id") == [("first", "x"), ("7", "y")]


@pytest.mark.parametrize(
    ("cut", "found"),
    [
        ("line", [("a-1", "one"), ("a-2", " two "), ("a-5", "three")]),
        ("paragraph", [("a-1", "one\n two "), ("a-5", "three")]),
        ("document", [("a", "one\n two \n\n\nthree\n")]),
    ],
)
def test_plain_text(tmp_path: Path, cut: str, found: Any) -> None:
    content = "one\n two \n\n\nthree\n"
    right = [(name, text.rstrip("\n")) for name, text in found]
    assert texts(tmp_path / "a.txt", content, cut=cut) == right


def test_fasta(tmp_path: Path) -> None:
    path, content = tmp_path / "p.fasta", ">sp|P1|A some protein\nMKV\nLA*\n\n>second\n;old\nmk-v\n"
    assert texts(path, content) == [("sp|P1|A", "MKVLA*"), ("second", "mk-v")]
    assert [name for name, _ in texts(path, content, number=True)] == ["p-1", "p-2"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    import pyarrow.parquet as parquet

    path = tmp_path / "t.parquet"
    table = pyarrow.table({"text": ["one", "zwei"], "id": ["x", "y"], "n": [1, 2]})
    parquet.write_table(table, path)
    assert [text[:2] for text in read_texts([str(path)], Reading(id="id"))] == [
        ("x", "one"),
        ("y", "zwei"),
    ]
    assert [text.name for text in read_texts([str(path)], Reading(id="n"))] == ["1", "2"]
    for how, message in (
        (Reading("body"), r"t.parquet: has no column 'body'; it has text, id, n. Fix: .*--field"),
        (Reading("n"), r"t.parquet, row 1: n is 1, no text. Fix: .*--field NAME"),
    ):
        with pytest.raises(RejectedError, match=message):
            list(read_texts([str(path)], how))
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(RejectedError, match=r"t.parquet, row 2: text is null, no text"):
        list(read_texts([str(path)], Reading()))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RejectedError, match=r"t.parquet: can't be read: .*Fix: copy it again"):
        list(read_texts([str(path)], Reading()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": 5}',
            r"a.jsonl, line 2: text is 5, no text. Fix: correct",
        ),
        ("a.jsonl", '{"text": ""}', r'line 1: text is "". Fix'),
        ("a.jsonl", '{"body": "x"}', r"line 1: has no 'text'; it has body. Fix: .*--field NAME"),
        ("a.jsonl", '["x"]', r'line 1: is \["x"\], no object. Fix: write {"text'),
        ("a.jsonl", '{"text": "x"', r"line 1: is no JSON: .*Fix: write one object a line"),
        ("a.jsonl", "[" * 100_000, r"line 1: is no JSON"),
        ("a.jsonl", '{"text": "a\\ud800"}', r"line 1: character 2 is half of a surrogate pair"),
        (
            "a.jsonl",
            b'\n{"text": "\xe9"}',
            r"line 2: byte 11 is 0xe9, which is no UTF-8. Fix: .*ic",
        ),
        ("a.txt", b"one\n\xff", r"a.txt, line 2: byte 1 is 0xff"),
        ("p.fa", "MKV\n", r'p.fa, line 1: "MKV" before any >. Fix: begin with > NAME'),
        ("p.fa", ">a\n>b\nMKV", r"p.fa, line 1: >a has no sequence. Fix: leave it out"),
        ("p.fa", ">a\nMKV\n> \nMKV", r"p.fa, line 3: a record without a name. Fix: .*--number"),
        ("p.fa", ">a\nMKV\nM3V", r"p.fa, line 3: '3' stands for no residue"),
        ("a.csv", "x", r"a.csv: its ending is '.csv'. Fix: .*\.jsonl"),
        ("a.txt.gz", b"\x1f\x8b", r"ending is '.gz'. Fix: .*unpack it"),
    ],
)
def test_wrong_input(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(RejectedError, match=message):
        texts(tmp_path / name, content)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"no.jsonl: can't be opened: No such file"):
        list(read_texts([str(tmp_path / "no.jsonl")], Reading()))
