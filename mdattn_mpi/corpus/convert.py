"""Texts into a file of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mdattn_mpi.corpus import packing
from mdattn_mpi.corpus.texts import Reading, Text, read_texts
from mdattn_mpi.corpus.tokenizer import Tokenizer, Tokens
from mdattn_mpi.dataset import DatasetWriter
from mdattn_mpi.dataset.layout import MAX_ITEMS
from mdattn_mpi.errors import RejectedError


@dataclass
class Report:
    """What was written."""

    texts: int = 0
    items: int = 0
    tokens: int = 0
    longest: int = 0  # tokens of an item
    beyond: int = 0  # texts that are longer than --pack
    unknown: int = 0  # tokens
    first_unknown: str = ""  # where

    def add(self, tokens: Tokens) -> None:
        """Count a text."""
        self.texts += 1
        self.tokens += len(tokens.ids)
        self.first_unknown = self.first_unknown or (tokens.source.place if tokens.unknown else "")
        self.unknown += tokens.unknown


def convert_texts(
    paths: Sequence[str],
    output: str,
    tokenizer: str,
    how: Reading,
    *,
    pack: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Report:
    """Write the texts of all files as token ids.

    Parameters
    ----------
    paths, output
        The files, and what is written; it is there once all has gone well.
    tokenizer
        A folder.
    how
        How texts are found and named.
    pack
        Tokens of a sequence that short texts share; None gives each its own.
    overwrite
        Whether `output` may be there already.
    progress
        Is told of bytes that were read.

    Raises
    ------
    RejectedError
        Of a text, with file, line, value and fix; or the output can't be made.

    """
    report = Report()

    def counted(texts: Iterator[Tokens]) -> Iterator[Tokens]:
        for tokens in texts:
            report.add(tokens)
            report.beyond += pack is not None and len(tokens.ids) > pack
            progress(tokens.source.nbytes)
            yield tokens

    maker = Tokenizer(tokenizer)
    with DatasetWriter(output, overwrite=overwrite) as writer:
        tokens = counted(maker.encode_all(_some(read_texts(paths, how), paths[0])))
        for each in packing.alone(tokens) if pack is None else packing.pack(tokens, pack):
            _write(writer, each, packed=pack is not None)
            report.items += 1
            report.longest = max(report.longest, sum(len(text.ids) for text in each.texts))
            if report.items > MAX_ITEMS:
                raise RejectedError(
                    f"more than {MAX_ITEMS} items", fix="pack them with --pack N, or split the file"
                )
    return report


def _some(texts: Iterator[Text], path: str) -> Iterator[Text]:
    """Refuse files without any text."""
    first = next(texts, None)
    if first is None:
        raise RejectedError("holds no text", fix="name a file that has some", file=path)
    yield first
    yield from texts


def _write(writer: DatasetWriter, each: packing.NewItem, *, packed: bool) -> None:
    ids = np.concatenate([text.ids for text in each.texts])
    names = [text.source.name for text in each.texts] if packed else ()
    try:
        writer.add_tokens(each.name, ids, each.starts if packed else None, names)
    except RejectedError as error:
        error.file = each.texts[0].source.place
        if not packed:
            error.fix = "give each text a name of its own with --id, or number them: --number"
        raise
