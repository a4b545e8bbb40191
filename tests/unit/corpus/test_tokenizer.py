"""Tokenizers: all of a text, with their own special tokens, in one process or in several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra transformers")

from mdattn_mpi.corpus import tokenizer as module
from mdattn_mpi.corpus.texts import Text
from mdattn_mpi.corpus.tokenizer import Tokenizer
from mdattn_mpi.errors import RejectedError
from tests.support import tiny_tokenizers


def text(words: str, number: int = 0) -> Text:
    return Text(f"t{number}", words, f"a.txt, line {number}", 1)


def test_special_tokens_and_nothing_cut_off(tmp_path: Path) -> None:
    found = Tokenizer(str(tiny_tokenizers.letters(tmp_path))).encode(text("ab " * 100 + "é ☃"))
    names = [tiny_tokenizers.LETTERS[number] for number in found.ids]
    assert names == ["[CLS]", *["a", "##b"] * 100, "e", "[UNK]", "[SEP]"]
    assert (found.ids.dtype, found.unknown) == (np.uint16, 1)


def test_plain_python_tokenizer(tmp_path: Path) -> None:
    found = Tokenizer(str(tiny_tokenizers.residues(tmp_path))).encode(text("MKVm"))
    names = [tiny_tokenizers.RESIDUES[number] for number in found.ids]
    assert names == ["<cls>", "M", "K", "V", "<unk>", "<eos>"]
    assert found.unknown == 1


def test_processes_give_the_same_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 20)
    maker = Tokenizer(str(tiny_tokenizers.letters(tmp_path)))
    texts = [text("abcdefghij"[: n % 10 + 1] * 3, n) for n in range(40)]
    alone, shared = (list(maker.encode_all(iter(texts), processes)) for processes in (1, 2))
    assert [each.source for each in shared] == texts
    for one, other in zip(alone, shared, strict=True):
        assert np.array_equal(one.ids, other.ids)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"finds no tokenizer there that it knows.*Fix: .*save_pretrained"),
        ({"tokenizer.json": "{"}, r"finds no tokenizer there"),
        (
            {"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}})},
            r"tokenizer_config.json: wants code of its own",
        ),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RejectedError, match=message):
        Tokenizer(str(tmp_path))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"nowhere: isn't a folder. Fix: name a local folder"):
        Tokenizer(str(tmp_path / "nowhere"))
