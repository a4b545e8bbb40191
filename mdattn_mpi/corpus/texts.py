"""Texts, one after the other, of files of several kinds; a file's ending says which it is.

JSON Lines (https://jsonlines.org), plain text, FASTA (what NCBI describes at
https://www.ncbi.nlm.nih.gov/genbank/fastaformat) and Parquet. All text is UTF-8.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mdattn_mpi.dataset.kinds import must_be_regular
from mdattn_mpi.dataset.layout import shown
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.text import install

Cut = Literal["line", "paragraph", "document"]

SHOWN = 60  # characters of a wrong value that a message repeats
ROWS = 1024  # of a Parquet file that are read at a time
RESIDUES = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz*-.")


class Text(NamedTuple):
    """One text, what it is called, where it stands, and how many bytes of its file it took."""

    name: str
    text: str
    place: str
    nbytes: int


@dataclass(frozen=True)
class Reading:
    """How texts are found and named.

    Parameters
    ----------
    field, id
        Which field or column has the text, and which the name; without `id`, texts are numbered.
    cut
        Whether a line of a .txt file is a text, a paragraph, or all of it.
    number
        Whether FASTA records are numbered too, rather than called what the file calls them.

    """

    field: str = "text"
    id: str = ""
    cut: Cut = "line"
    number: bool = False


def read_texts(paths: Sequence[str], how: Reading) -> Iterator[Text]:
    """Read all texts, in their order.

    Raises
    ------
    RejectedError
        Something isn't as it should be; says file, line, value and fix.

    """
    for path in paths:
        must_be_regular(path)
        yield from reader_of(path)(path, how)


def reader_of(path: str) -> Callable[[str, Reading], Iterator[Text]]:
    """Choose a reader by a file's ending.

    Raises
    ------
    RejectedError
        There is none for it.

    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in _READERS:
        raise RejectedError(
            f"its ending is {ending or 'none'!r}",
            fix=f"name it after what it is: {', '.join(_READERS)}; unpack it if it is compressed",
            file=path,
        )
    return _READERS[ending]


def _reject(path: str, place: str, what: str, fix: str) -> RejectedError:
    return RejectedError(what, fix=fix, file=f"{path}, {place}")


def _numbered(path: str, number: int) -> str:
    return f"{Path(path).stem}-{number}"


def _lines(path: str) -> Iterator[tuple[int, str, int]]:
    """Yield number, text without its end, and bytes of every line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, _decoded(path, number, line).rstrip("\r\n"), len(line)
    except OSError as error:
        raise RejectedError(
            f"can't be read: {error.strerror}", fix="check the path", file=path
        ) from error


def _decoded(path: str, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _reject(
            path,
            f"line {number}",
            f"byte {error.start + 1} is 0x{line[error.start]:02x}, which is no UTF-8",
            "convert it: iconv -f LATIN1 -t UTF-8, or from whatever it is in",
        ) from None


def _jsonl(path: str, how: Reading) -> Iterator[Text]:
    for number, line, nbytes in _lines(path):
        if line.strip():
            place = f"line {number}"
            fields = _object(path, place, line)
            text = _field(path, place, fields, how.field, "--field")
            name = _name(path, place, fields, how, number)
            yield Text(name, text, f"{path}, {place}", nbytes)


def _object(path: str, place: str, line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _reject(path, place, f"is no JSON: {error}", "write one object a line") from None
    if not isinstance(found, dict):
        raise _reject(
            path, place, f"is {_short(found)}, no object", 'write {"text": "…"} on each line'
        )
    return found


def _field(path: str, place: str, fields: Mapping[str, Any], name: str, option: str) -> str:
    """Look up a text that can be written."""
    if name not in fields:
        known = ", ".join(map(shown, list(fields)[:8])) or "none"
        raise _reject(
            path, place, f"has no {name!r}; it has {known}", f"name the right one: {option} NAME"
        )
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise _reject(
            path,
            place,
            f"{name} is {_short(value)}" + ("" if value == "" else ", no text"),
            f"correct it or leave it out, or name another with {option} NAME",
        )
    return _writable(path, place, value)


def _writable(path: str, place: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _reject(
            path,
            place,
            f"character {error.start + 1} is half of a surrogate pair, {text[error.start]!a}",
            "correct the program that wrote it, or leave the text out",
        ) from None
    return text


def _name(path: str, place: str, fields: Mapping[str, Any], how: Reading, number: int) -> str:
    if not how.id:
        return _numbered(path, number)
    value = fields.get(how.id)
    if type(value) is int:
        return str(value)
    return _field(path, place, fields, how.id, "--id")


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _txt(path: str, how: Reading) -> Iterator[Text]:
    if how.cut == "document":
        lines = list(_lines(path))
        text = "\n".join(line for _, line, _ in lines)
        if not text.strip():
            raise RejectedError("holds no text", fix="leave it out", file=path)
        yield Text(Path(path).stem, text, path, sum(nbytes for *_, nbytes in lines))
        return
    blocks = _paragraphs(path) if how.cut == "paragraph" else _lines(path)
    for number, text, nbytes in blocks:
        if text.strip():
            yield Text(_numbered(path, number), text, f"{path}, line {number}", nbytes)


def _paragraphs(path: str) -> Iterator[tuple[int, str, int]]:
    """Join lines up to an empty one; the number is that of the first."""
    first, block, size = 0, list[str](), 0
    for number, line, nbytes in _lines(path):
        size += nbytes
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield first, "\n".join(block), size
            block, size = [], 0
    if block:
        yield first, "\n".join(block), size


def _fasta(path: str, how: Reading) -> Iterator[Text]:
    count, header, first, parts, size = 0, "", 0, list[str](), 0

    def record() -> Text:
        place = f"line {first}"
        words = header[1:].split()
        if not parts:
            raise _reject(path, place, f"{shown(header)} has no sequence", "leave it out")
        if not (words or how.number):
            raise _reject(path, place, "a record without a name", "name it, or say --number")
        name = _numbered(path, count) if how.number else words[0]
        return Text(name, "".join(parts), f"{path}, {place}", size)

    for number, line, nbytes in _lines(path):
        if line.startswith(">"):
            if header:
                yield record()
            count, header, first, parts, size = count + 1, line, number, [], 0
        elif line.strip() and not line.startswith(";"):
            parts.append(_residues(path, number, line, header))
        size += nbytes
    if header:
        yield record()


def _residues(path: str, number: int, line: str, header: str) -> str:
    if not header:
        raise _reject(path, f"line {number}", f"{_short(line)} before any >", "begin with > NAME")
    letters = "".join(line.split())
    wrong = next((letter for letter in letters if letter not in RESIDUES), None)
    if wrong is not None:
        raise _reject(
            path, f"line {number}", f"{wrong!r} stands for no residue", "correct the sequence"
        )
    return letters


def _parquet(path: str, how: Reading) -> Iterator[Text]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RejectedError("Parquet needs pyarrow", fix=install("parquet"), file=path) from None
    columns = [how.field, *([how.id] if how.id else [])]
    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = file.schema_arrow.names
        missing = next((name for name in columns if name not in known), None)
        if missing is not None:
            raise RejectedError(
                f"has no column {missing!r}; it has {', '.join(map(shown, known[:8]))}",
                fix="name the right one with --field and --id",
                file=path,
            )
        nbytes = os.path.getsize(path) // max(1, file.metadata.num_rows)
        batches = (batch.to_pylist() for batch in file.iter_batches(ROWS, columns=columns))
        for number, fields in enumerate(chain.from_iterable(batches), 1):
            place = f"row {number}"
            text = _field(path, place, fields, how.field, "--field")
            name = _name(path, place, fields, how, number)
            yield Text(name, text, f"{path}, {place}", nbytes)
    except (pyarrow.ArrowException, OSError) as error:
        raise RejectedError(
            f"can't be read: {error}", fix="copy it again, or write it anew", file=path
        ) from error


_READERS: Mapping[str, Callable[[str, Reading], Iterator[Text]]] = {
    ".jsonl": _jsonl,
    ".txt": _txt,
    ".fasta": _fasta,
    ".fa": _fasta,
    ".faa": _fasta,
    ".fna": _fasta,
    ".parquet": _parquet,
}
