"""Tokenizers of a few ids, saved as folders: WordPiece over letters, and ESM's over residues."""

from __future__ import annotations

import json
import string
from pathlib import Path

LETTERS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *string.ascii_lowercase,
    *(f"##{letter}" for letter in string.ascii_lowercase),
    *(".", ",", "!"),
)
RESIDUES = (
    "<cls>",
    "<pad>",
    "<eos>",
    "<unk>",
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    "<null_1>",
    "<mask>",
)


def letters(folder: Path) -> Path:
    """Make a BERT's, implemented in Rust: ``[CLS]``, a token a letter, ``[SEP]``; cut at 16."""
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 16}
    return _save(folder, LETTERS, config)


def residues(folder: Path) -> Path:
    """Make an ESM's, in plain Python: ``<cls>``, a token a residue, ``<eos>``."""
    return _save(folder, RESIDUES, {"tokenizer_class": "EsmTokenizer"})


def _save(folder: Path, vocabulary: tuple[str, ...], config: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
