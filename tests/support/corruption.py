"""Change bytes of a file, one after the other, and look at what its reader makes of each.

``python -m tests.support.corruption dataset|output|plain PATH METADATA_STEP DATA_STEP`` prints, as
JSON, how many changes were detected (an error), listed (an item is named), or without effect, and
those that were neither. It runs in a process of its own: what crashes or hangs is the place in
``PATH.at``. With steps of 1 every byte is tried.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from mdattn_mpi.dataset import open_dataset, open_output
from mdattn_mpi.dataset.layout import TENSORS
from mdattn_mpi.errors import MdattnError
from mdattn_mpi.problem import Span

Look = Callable[[], tuple[Any, list[Any]]]


def look_at_dataset(path: str) -> tuple[Any, list[Any]]:
    """What the file says, and which items it names as bad."""
    with open_dataset(path, keep_faults=True) as dataset:
        listed: list[Any] = [fault.item for fault in dataset.faults]
        said = [
            (item, [dataset.tensor(item, name).crc32 for name in TENSORS]) for item in dataset.items
        ]
        for item, crc32s in said:
            for name, crc32 in zip(TENSORS, crc32s, strict=True):
                if dataset.checksum(item, name) != crc32:
                    listed.append(item.name)
        return said, listed


def look_at_output(path: str) -> tuple[Any, list[Any]]:
    """What the file says, and which items it names as damaged or not done."""
    with open_output(path) as output:
        listed: list[Any] = []
        entries = output.ledger.entries()
        for item, entry in zip(output.items, entries, strict=True):
            good = entry.state == "done" and all(
                output.checksum(item, spans) == crc32
                for spans, crc32 in zip(entry.shards, entry.crc32s, strict=True)
            )
            if not good:
                listed.append(item.name)
        return (output.items, output.attributes, output.lse, entries), listed


def look_at_plain(path: str) -> tuple[Any, list[Any]]:
    """Read all of a file without checksums; any content will do."""
    with open_dataset(path, keep_faults=True) as dataset:
        for item in dataset.items:
            for name in TENSORS:
                tokens = dataset.tensor(item, name).shape[0]
                try:
                    dataset.read(item, name, (Span(0, tokens),))
                except MdattnError as error:
                    return None, [str(error)]
    return None, []


def places(path: str, metadata_step: int, data_step: int) -> Iterator[int]:
    """Some bytes of metadata, and some of the contents."""
    data = regions(path)
    for offset in range(os.path.getsize(path)):
        inside = any(start <= offset < stop for start, stop in data)
        if offset % (data_step if inside else metadata_step) == 0:
            yield offset


def regions(path: str) -> list[tuple[int, int]]:
    """Where the contents of large contiguous datasets are."""
    import h5py

    found: list[tuple[int, int]] = []

    def visit(_: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.id.get_offset() is not None:
            size = node.id.get_type().get_size() * node.size
            if size > 4096:
                found.append((node.id.get_offset(), node.id.get_offset() + size))

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def judge(look: Look, before: tuple[Any, list[Any]]) -> str:
    """What came of a change."""
    try:
        said, listed = look()
    except MdattnError:
        return "detected"
    if listed != before[1]:
        return "listed"
    return "without effect" if said == before[0] else "unnoticed"


def main(kind: str, path: str, metadata_step: int, data_step: int) -> None:
    """Change every place once: a bit, or all of the byte."""
    looks = {"dataset": look_at_dataset, "output": look_at_output, "plain": look_at_plain}
    look = looks[kind]
    with open(path, "rb") as file:
        content = file.read()
    before = look(path)
    assert not before[1], before
    outcomes: Counter[str] = Counter()
    unnoticed = []
    draw = random.Random(0)
    with open(path, "r+b", buffering=0) as file, open(path + ".at", "w") as at:
        for offset in places(path, metadata_step, data_step):
            right = content[offset]
            other = draw.choice([right ^ 1 << draw.randrange(8), 255 - right])
            at.seek(0)
            at.write(f"{offset} {other}      ")
            at.flush()
            os.pwrite(file.fileno(), bytes([other]), offset)
            outcome = judge(lambda: look(path), before)
            os.pwrite(file.fileno(), bytes([right]), offset)
            outcomes[outcome] += 1
            if outcome == "unnoticed":
                unnoticed.append((offset, right, other))
    print(json.dumps({"outcomes": outcomes, "unnoticed": unnoticed}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
