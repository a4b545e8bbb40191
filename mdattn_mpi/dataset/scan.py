"""The one program that lets HDF5 look at a file: a process of its own, which may crash.

``python -m mdattn_mpi.dataset.scan`` answers requests of `mdattn_mpi.dataset.scanner`. libhdf5 can
crash, loop or ask for gigabytes where a byte is wrong; all of that ends here, under limits on time,
memory and core.

An answer is a *catalog*: what the file holds, as JSON and a table of chunks. A node of it is a
dictionary: ``g`` the children of a group (null where a link leads nowhere, false where nobody asked
for it), ``d`` the form of a dataset (an index into ``forms``), ``o`` its offset, ``c`` its place in
the table of chunks, ``a`` attributes, ``p`` its path and ``f`` its file (an index into ``files``)
where a link led there; or ``fault``: what is wrong with it, and the fix.
"""

from __future__ import annotations

import gc
import io
import json
import mmap
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import h5py
import numpy as np

from mdattn_mpi.dataset.hdf5_types import stored_as
from mdattn_mpi.dataset.index import may_match, patterns_of
from mdattn_mpi.dataset.layout import ITEMS, MAX_CHUNK_BYTES, MAX_ITEMS, MAX_NODES, shown
from mdattn_mpi.dataset.scanner import DAMAGED, PAGE_BYTES
from mdattn_mpi.dataset.source import Array, Object, Record, Source, fault
from mdattn_mpi.errors import RejectedError

MEMORY_BYTES = 2 << 30  # that a look at a file may take; 100,000 items take 0.8 GB
READ_MEMORY_BYTES = 3 * MAX_CHUNK_BYTES  # a chunk as stored, decoded, and between two filters
CPU_SECONDS = 2.0  # that one object may take; an honest one takes milliseconds …
BYTES_PER_SECOND = 50e6  # … unless it has millions of chunks, in a file of that size
ALLOWED_SECONDS = 60.0  # more, where it may lie in another file that the user trusts
IDLE_SECONDS = 10.0  # after which nobody seems to ask any more


class Scan:
    """One walk through a file.

    In a request, ``depth`` is how far to go down, ``select`` which children of ``/items`` to look
    at, ``skip`` at which paths HDF5 crashed before, and how. `mark` is told of every path before
    HDF5 is.
    """

    def __init__(self, source: Source, request: Record, mark: Callable[[str], None]) -> None:
        self._source = source
        self._depth: int = request["depth"]
        self._patterns = patterns_of(request["select"])
        self._skip: dict[str, str] = request["skip"]
        self._mark = mark
        self._whole = self._depth > 3  # a tree of unknown shape, where a group is met once
        self._seen: set[tuple[int, int]] = set()
        self._nodes = 0
        self._catalog: Record = {
            "size": source.size,
            "files": [source.path],
            "types": [],
            "forms": [],
        }
        self._forms: dict[str, int] = {}
        self._types: dict[tuple[bytes, str], int] = {}
        self._tables: list[Array] = []
        self._table_length = 0

    def run(self) -> tuple[Record, bytes]:
        """Walk; return the catalog and its table of chunks."""
        self._mark("/")
        self._catalog["root"] = self._describe(self._source.root, "/", 0)
        return self._catalog, b"".join(table.tobytes() for table in self._tables)

    def _look(self, parent: Object, name: str, kind: int, path: str, depth: int) -> Record | None:
        """Describe a child; None where its link leads nowhere."""
        if self._whole or depth < 3:
            self._mark(path)  # of an item, not of each of its tensors
        if path in self._skip:
            what = f"HDF5 can't read {shown(path)} ({self._skip[path]})"
            return fault(self._source.reject(what, DAMAGED))
        self._nodes += 1
        if self._whole and self._nodes > MAX_NODES:
            raise TooManyError(f"holds more than {MAX_NODES} objects")
        try:
            found = parent.child(name, kind)
            return None if found is None else self._describe(found, path, depth)
        except TooManyError:
            raise
        except Exception as error:
            return fault(parent.source.wrap(error, path))

    def _describe(self, node: Object, path: str, depth: int) -> Record:
        record: Record = {}
        if node.path != path:
            record["p"] = node.path
        if node.source is not self._source:
            files: list[str] = self._catalog["files"]
            if node.source.path not in files:
                files.append(node.source.path)
            record["f"] = files.index(node.source.path)
        attributes = node.attributes()
        if attributes:
            record["a"] = attributes
        if isinstance(node.id, h5py.h5g.GroupID):
            record["g"] = self._children(node, path, depth + 1)
        elif isinstance(node.id, h5py.h5d.DatasetID):
            try:
                form, place = node.storage(self._add_table)
                record["d"] = self._form(form, self._type(node, attributes.get("dtype", "")))
                record |= place
            except Exception as error:
                record["d"] = fault(node.source.wrap(error, node.path))
        return record

    def _children(self, group: Object, path: str, depth: int) -> Record:
        if depth > self._depth:
            return {}
        if self._whole:
            about = h5py.h5o.get_info(group.id)
            if (about.fileno, about.addr) in self._seen:
                return {}
            self._seen.add((about.fileno, about.addr))
        selected = path == f"/{ITEMS}" and not self._whole
        children: Record = {}
        for name, kind in group.links(MAX_ITEMS if selected else MAX_NODES).items():
            if selected and not any(may_match(name, pattern) for pattern in self._patterns):
                children[name] = False
            else:
                below = f"{path.rstrip('/')}/{name}"
                children[name] = self._look(group, name, kind, below, depth)
        return children

    def _type(self, node: Object, dtype: object) -> int:
        """What the elements are: an index into ``types``."""
        key = (node.type.encode(), str(dtype))
        if key not in self._types:
            found = stored_as(node.type, lambda: str(dtype))
            self._types[key] = len(self._types)
            self._catalog["types"].append({"stored": found, "numpy": _numpy_name(node.type)})
        return self._types[key]

    def _form(self, form: Record, stored: int) -> int:
        """What datasets of a kind have in common: an index into ``forms``."""
        key = f"{form} {stored}"
        if key not in self._forms:
            self._forms[key] = len(self._forms)
            self._catalog["forms"].append({**form, "type": stored})
        return self._forms[key]

    def _add_table(self, chunks: Array) -> int:
        self._tables.append(chunks)
        self._table_length += len(chunks)
        return self._table_length - len(chunks)


class TooManyError(Exception):
    """The whole file is refused, not the object at which that was noticed."""


def _numpy_name(stored: Any) -> str | None:
    """Name the NumPy dtype that is exactly this type: integers, IEEE floats, fixed text."""
    kind, size = stored.get_class(), stored.get_size()
    if kind == h5py.h5t.STRING and not stored.is_variable_str():
        return f"|S{size}"
    if kind not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) or size not in (1, 2, 4, 8):
        return None
    dtype: np.dtype[Any] = stored.dtype
    return dtype.str if stored.equal(h5py.h5t.py_create(dtype)) else None


def _limit_memory(nbytes: int) -> None:
    """From now on, take at most so much more."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or now + nbytes < hard:
        resource.setrlimit(resource.RLIMIT_AS, (now + nbytes, hard))


def _drop_plugins(allow: Sequence[str]) -> None:
    """Take every folder that isn't allowed off HDF5's search path for filter plugins."""
    for position in reversed(range(h5py.h5pl.size())):
        folder = os.path.realpath(os.fsdecode(h5py.h5pl.get(position)))
        if not any(os.path.commonpath((root, folder)) == root for root in allow):
            h5py.h5pl.remove(position)


def answer(request: Record, allow: Sequence[str], page: mmap.mmap) -> tuple[Record, bytes]:
    """Scan a file, or read a box of a dataset."""
    seconds = CPU_SECONDS + os.path.getsize(request["path"]) / BYTES_PER_SECOND
    seconds += ALLOWED_SECONDS if allow else 0
    parent = os.getppid()

    def mark(path: str) -> None:
        if os.getppid() != parent:
            os._exit(0)  # it has died, and nobody waits for an answer
        text = os.fsencode(path)[: PAGE_BYTES - 1]
        page[: len(text) + 1] = text + b"\0"
        signal.setitimer(signal.ITIMER_PROF, seconds)

    mark("/")
    _limit_memory(MEMORY_BYTES)
    source = Source(request["path"], allow)
    try:
        if "depth" in request:
            return Scan(source, request, mark).run()
        node = source.root.walk(request["node"])
        if node is None:
            raise source.reject("changed while it was read", "run the same command again")
        form, _ = node.storage(len)
        _limit_memory(READ_MEMORY_BYTES + prod(request["count"]) * form["itemsize"])
        return {}, node.read_box(request["start"], request["count"]).tobytes()
    finally:
        source.close()


def serve(allow: Sequence[str], page: mmap.mmap, requests: io.BufferedReader, answers: int) -> None:
    """Answer one request after the other, until nobody asks any more."""
    while select.select([requests], [], [], IDLE_SECONDS)[0]:
        line = requests.readline()
        if not line:
            return
        try:
            found, blob = answer(json.loads(line), allow, page)
        except RejectedError as error:
            found, blob = fault(error), b""
        except (TooManyError, MemoryError) as error:
            what = str(error) or "its metadata takes too much memory"
            found, blob = {"fault": [what, "split the file", ""]}, b""
        except Exception as error:
            found, blob = {"error": f"{type(error).__name__}: {error}"}, b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        text = json.dumps(found).encode()
        with open(answers, "wb", closefd=False) as file:
            file.write(len(text).to_bytes(8, "little") + len(blob).to_bytes(8, "little"))
            file.write(text)
            file.write(blob)


def main() -> None:
    """Take the page for marks and the allowed folders from the command line."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.disable()  # looking for cycles among many new objects takes as long as making them
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank; we end with our standard input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    allow = sys.argv[2:]
    _drop_plugins(allow)
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print isn't part of the answer
    with mmap.mmap(int(sys.argv[1]), PAGE_BYTES) as page:
        serve(allow, page, sys.stdin.buffer, answers)  # type: ignore[arg-type]
    os._exit(0)  # at once: nothing is left to be done


if __name__ == "__main__":
    main()
