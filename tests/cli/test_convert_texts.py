"""``mdattn convert --tokenizer``: texts become token ids."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra transformers")

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import open_tokens
from tests.support import tiny_tokenizers
from tests.support.complaint import complaint

Capture = pytest.CaptureFixture[str]


def refused(command: list[str], capsys: Capture, message: str) -> None:
    try:
        code = main(command)
    except SystemExit as usage:
        code = int(usage.code or 0)
    assert code == 2
    assert re.search(message, complaint(capsys))


def test_one_item_a_text(tmp_path: Path, capsys: Capture) -> None:
    tokenizer = tiny_tokenizers.residues(tmp_path / "esm")
    source, made = tmp_path / "p.fasta", tmp_path / "t.h5"
    source.write_text(">one x\nMKV\n>two\nLA\nGV\n")
    assert main(["convert", str(source), str(made), "--tokenizer", str(tokenizer)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 texts, 11 tokens in 2 items, the longest of 6" in printed
    with open_tokens(made) as file:
        assert [item.name for item in file.items] == ["one", "two"]
        names = [tiny_tokenizers.RESIDUES[number] for number in file.ids(file.items[1])]
        assert names == ["<cls>", "L", "A", "G", "V", "<eos>"]


def test_packed(tmp_path: Path, capsys: Capture) -> None:
    tokenizer = tiny_tokenizers.letters(tmp_path / "bert")
    source, made = tmp_path / "a.txt", tmp_path / "t.h5"
    source.write_text("ab\nc\nabcdefghijk\n☃\n")
    command = ["convert", str(source), str(made), "--tokenizer", str(tokenizer), "--pack", "8"]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 texts, 23 tokens in 3 items, the longest of 13" in printed
    assert "warning: 1 text of more than 8 tokens, each in an item of its own" in printed
    assert f"warning: 1 token the tokenizer doesn't know, the first in {source}, line 4" in printed
    with open_tokens(made) as file:
        assert [file.starts(item).tolist() for item in file.items] == [[0, 4], [0], [0]]
        assert np.array_equal(file.ids(file.items[0])[4:], [2, 7, 3])
    with h5py.File(made) as raw:
        assert [name.decode() for name in raw["items/pack0/names"]] == ["a-1", "a-2"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (">a\nMKV\n>a\nMK", [], r"p.fasta, line 3, item 'a': is in the dataset.*--number"),
        (">a/1-3\nMKV", [], r"p.fasta, line 1, item 'a/1-3': its name looks like a path.*--number"),
        ("\n", [], r"p.fasta: holds no text. Fix: name a file that has some"),
        (">a\nMKV", ["--causal"], r"--causal with --tokenizer. Fix: leave --causal out"),
        (">a\nMKV", ["--pack", "0"], r"--pack: '0' is no number of tokens"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: Capture, content: str, options: list[str], message: str
) -> None:
    tokenizer = tiny_tokenizers.residues(tmp_path / "esm")
    (tmp_path / "p.fasta").write_text(content)
    made = tmp_path / "t.h5"
    command = ["convert", str(tmp_path / "p.fasta"), str(made), "--tokenizer", str(tokenizer)]
    refused([*command, *options], capsys, message)
    assert not made.exists()


def test_texts_without_a_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.txt").write_text("some text")
    command = ["convert", str(tmp_path / "a.txt"), str(tmp_path / "t.h5")]
    refused(command, capsys, r"a.txt: is text. Fix: .*name its tokenizer: --tokenizer")
    refused([*command, "--pack", "9"], capsys, r"--pack without --tokenizer. Fix: .*tokenizer")
