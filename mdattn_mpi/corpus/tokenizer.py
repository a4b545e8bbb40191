"""A folder's tokenizer, on all cores: processes, because some tokenizers are plain Python."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.corpus.texts import Text
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.text import install

EXTRA = install("transformers")
BATCH_CHARACTERS = 1 << 20
AHEAD = 3  # batches a process that wait or are done

Batch = list[Text]


class Tokens(NamedTuple):
    """The ids of one text, special tokens included, and how many of them mean *unknown*."""

    source: Text
    ids: NDArray[Any]
    unknown: int


class Tokenizer:
    """What `AutoTokenizer` makes of a folder; nothing of the folder is run.

    Attributes
    ----------
    dtype
        The narrowest integers that hold every id.

    Raises
    ------
    RejectedError
        Transformers isn't installed; the folder isn't there, has no tokenizer, or wants code of
        its own to be run.

    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        if find_spec("transformers") is None:
            raise RejectedError("--tokenizer needs transformers", fix=EXTRA)
        if not Path(folder).is_dir():
            raise RejectedError(
                "isn't a folder", fix="name a local folder with a tokenizer in it", file=folder
            )
        _refuse_code(Path(folder) / "tokenizer_config.json")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are enough
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # of many kinds, from several libraries
            words = str(error).strip().partition("\n")[0]
            raise RejectedError(
                f"Transformers finds no tokenizer there that it knows: {words}",
                fix="save one there: tokenizer.save_pretrained(FOLDER)",
                file=folder,
            ) from error
        self._unknown = self._tokenizer.unk_token_id
        self.dtype = np.dtype(np.uint16 if len(self._tokenizer) <= 1 << 16 else np.int32)

    def encode(self, source: Text) -> Tokens:
        """Make ids of a text, as many as it has: what the folder says of cutting doesn't count.

        Raises
        ------
        RejectedError
            It gives no token, or the tokenizer can't.

        """
        try:
            ids = self._tokenizer(
                source.text,
                truncation=False,
                padding=False,
                verbose=False,
                return_attention_mask=False,
            )["input_ids"]
        except Exception as error:
            raise RejectedError(
                f"the tokenizer can't: {type(error).__name__}: {error}",
                fix="leave the text out, or use another tokenizer",
                file=source.place,
            ) from error
        if not ids:
            raise RejectedError("gives no token", fix="leave the text out", file=source.place)
        unknown = 0 if self._unknown is None else ids.count(self._unknown)
        return Tokens(source, np.array(ids, self.dtype), unknown)

    def encode_all(self, texts: Iterator[Text], processes: int | None = None) -> Iterator[Tokens]:
        """Make ids of all texts, in their order; by other processes where there are many.

        Raises
        ------
        RejectedError
            As `encode`, or of `texts`.
        DeviceError
            A process was killed.

        """
        batches = _batches(texts)
        first = next(batches, [])
        second = next(batches, [])
        count = len(os.sched_getaffinity(0)) if processes is None else processes
        if count < 2 or not second:
            for source in chain(first, second, *batches):
                yield self.encode(source)
            return
        try:
            yield from self._by_processes(chain((first, second), batches), count)
        except BrokenProcessPool as error:
            raise DeviceError(
                "a process that tokenizes was killed", fix="give the job more memory"
            ) from error

    def _by_processes(self, batches: Iterator[Batch], count: int) -> Iterator[Tokens]:
        with ExitStack() as stack:
            pool = ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), _begin, (self.folder,)
            )
            stack.callback(pool.shutdown, cancel_futures=True)
            waiting: deque[Future[list[Tokens]]] = deque()
            for batch in batches:
                waiting.append(pool.submit(_encode, batch))
                if len(waiting) >= AHEAD * count:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()


def _refuse_code(config: Path) -> None:
    """Refuse a folder whose tokenizer is a program in it."""
    try:
        found = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # Transformers will say what is wrong, or needs none
    if isinstance(found, dict) and found.get("auto_map"):
        raise RejectedError(
            "wants code of its own to be run (auto_map), which is never done",
            fix="take auto_map out, if one of Transformers' own tokenizers is what is meant",
            file=str(config),
        )


def _batches(texts: Iterator[Text]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_tokenizer: Tokenizer | None = None  # of a process of the pool


def _begin(folder: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(folder)


def _encode(batch: Sequence[Text]) -> list[Tokens]:
    assert _tokenizer is not None
    return [_tokenizer.encode(source) for source in batch]
