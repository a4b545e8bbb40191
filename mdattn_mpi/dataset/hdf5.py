"""HDF5 files without HDF5: what a scan found, and the bytes at the places that it names.

`File` has a child process look at a file, or takes the catalog that another rank's child has made
of it. From then on the file is a tree in memory and a file descriptor for `os.preadv`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np

from mdattn_mpi.dataset import scanner
from mdattn_mpi.dataset.chunks import CHUNK, DECODED_HERE, Filter, read_chunks
from mdattn_mpi.dataset.dtypes import Stored, numpy_dtype
from mdattn_mpi.dataset.kinds import must_be_regular
from mdattn_mpi.dataset.positioned import Region
from mdattn_mpi.dataset.seen import Seen, fingerprint_of
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import TensorSpec

Value = str | int | float

ANY = -1  # in a shape: the file decides
WHOLE_TREE = 16  # levels of a file of unknown structure


@dataclass(frozen=True)
class Storage:
    """How the elements of a dataset are stored; many datasets have one `Storage` in common."""

    shape: tuple[int, ...]
    itemsize: int
    kind: Literal["contiguous", "compact", "chunked", "virtual", "external"]
    chunk: tuple[int, ...] = ()
    filters: tuple[Filter, ...] = ()
    stored: Stored | str = ""  # how it holds BF16 or FP16, or what it holds instead
    dtype: np.dtype[Any] | None = None  # the NumPy dtype that is just its type, if there is one

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, uncompressed."""
        return prod(self.shape) * self.itemsize

    def __str__(self) -> str:
        """For example ``chunked 64×8×128, gzip``."""
        chunk = " " + "×".join(map(str, self.chunk)) if self.chunk else ""
        return ", ".join((self.kind + chunk, *(step.name for step in self.filters)))


class LinkedFile:
    """A file that `os.preadv` reads from, opened when it is first needed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1

    @property
    def fd(self) -> int:
        """A descriptor, for reading."""
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise self.reject(
                    f"can't be opened: {(error.strerror or str(error)).lower()}",
                    "check who may read it",
                ) from None
        return self._fd

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def reject(self, what: str, fix: str) -> RejectedError:
        """Make an error about this file."""
        return RejectedError(what, fix=fix, file=self.path)


class File(LinkedFile):
    """An HDF5 file, opened for reading.

    Parameters
    ----------
    path
        A regular file.
    allow
        Folders that links, virtual datasets and external storage may lead to, and that filter
        plugins may come from.
    select
        The children of ``/items`` that are wanted: names or globs, separated by commas.
    depth
        How many levels are wanted; `WHOLE_TREE` where the structure isn't known.
    catalog
        What `scan_file` returned for the same file, where that is there already.

    Raises
    ------
    RejectedError
        No such file, not HDF5, truncated, damaged; another file than the catalog's.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        allow: Sequence[str] = (),
        *,
        select: str = "*",
        depth: int = 3,
        catalog: bytes | None = None,
    ) -> None:
        super().__init__(os.fspath(path))
        self.allow = allow
        self.select = select
        must_be_regular(self.path)
        self._before = before = os.fstat(self.fd)
        if catalog is None:
            catalog = scanner.scan_file(self.path, allow, select=select, depth=depth)
            after = os.stat(self.path)
            if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
                raise self.reject("was replaced while it was opened", "run the same command again")
        stop = 8 + int.from_bytes(catalog[:8], "little")
        found = json.loads(catalog[8:stop])
        if found["size"] != before.st_size:
            raise self.reject(
                f"has {before.st_size} bytes here, and {found['size']} for the rank that looked "
                "at it",
                "let all ranks see the same file",
            )
        self.forms = [_storage(form, found["types"]) for form in found["forms"]]
        self.files: list[LinkedFile] = [self, *map(LinkedFile, found["files"][1:])]
        self.chunks = np.frombuffer(catalog, CHUNK, offset=stop)
        self.root = Node(self, found["root"], "/")

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this file and those that links led to."""
        super().close()
        for file in self.files[1:]:
            file.close()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the size and some blocks of all files, the first and last among them."""
        return fingerprint_of([file.fd for file in self.files])

    @property
    def seen(self) -> Seen | None:
        """The file as it was before it was looked at; None where links led to others."""
        if len(self.files) > 1:
            return None
        return Seen.of(self.path, self._before, self.fingerprint)


class Node:
    """A group or dataset, as the scan found it. `path` is for messages."""

    __slots__ = ("_found", "_main", "path")

    def __init__(self, main: File, found: dict[str, Any], path: str) -> None:
        self._main = main
        self._found = found
        self.path: str = found.get("p", path)

    @property
    def file(self) -> LinkedFile:
        """Where it lies; another file than the opened one where a link led there."""
        found: LinkedFile = self._main.files[self._found.get("f", 0)]
        return found

    @property
    def is_group(self) -> bool:
        """Whether it has children."""
        return "g" in self._found

    @property
    def is_dataset(self) -> bool:
        """Whether it has elements."""
        return "d" in self._found

    def names(self) -> list[str]:
        """List the children's names, unsorted."""
        return list(self._found["g"])

    def child(self, name: str) -> Node | None:
        """Return one child; None where there is none, or a link to nothing.

        Raises
        ------
        RejectedError
            A link that leaves the file, and isn't allowed to; a damaged object.

        """
        found = self._found.get("g", {}).get(name)
        if not found:
            return None
        self._check(found)
        return Node(self._main, found, f"{self.path.rstrip('/')}/{name}")

    def _check(self, found: Any) -> None:
        if isinstance(found, dict) and "fault" in found:
            what, fix, file = found["fault"]
            raise RejectedError(what, fix=fix, file=file or self.file.path)

    def attribute(self, name: str) -> Value | None:
        """Return an attribute: text, or one number; None where there is none.

        Raises
        ------
        RejectedError
            It is of another kind, too large, or damaged.

        """
        value = self._found.get("a", {}).get(name)
        self._check(value)
        if isinstance(value, list):
            raise self.file.reject(
                f"attribute {name} of {self.path} is neither text nor one number",
                "correct the attribute",
            )
        found: Value | None = value
        return found

    def numbers(self, name: str, count: int) -> tuple[int, ...] | None:
        """Return an attribute of `count` integers; None where there is none of that kind."""
        value = self._found.get("a", {}).get(name)
        self._check(value)
        found = value if isinstance(value, list) else [value]
        whole = all(isinstance(number, int) for number in found)
        return tuple(found) if whole and len(found) == count else None

    def attribute_names(self) -> list[str]:
        """List the names of all attributes."""
        return list(self._found.get("a", {}))

    def attributes(self) -> dict[str, Value]:
        """Return all attributes; those that are neither text nor one number are left out."""
        values = self._found.get("a", {})
        return {name: v for name, v in values.items() if not isinstance(v, dict | list)}

    def storage(self) -> Storage:
        """Say how a dataset's elements are stored; the scan has checked every claim.

        Raises
        ------
        RejectedError
            Storage outside the file that isn't allowed, elements that were never written, or
            more of them than the file can hold.

        """
        self._check(self._found["d"])
        form: Storage = self._main.forms[self._found["d"]]
        return form

    @property
    def offset(self) -> int | None:
        """Where a dataset's elements begin in its file; None when they aren't in one run."""
        offset: int | None = self._found.get("o")
        return offset

    def region(self, tensor: TensorSpec, fix: str) -> Region:
        """Find a contiguous dataset of just this shape and dtype in this group and file.

        -1 in place of a dim: the file decides.

        Raises
        ------
        RejectedError
            It isn't there, or not like that.

        """
        node = self.child(tensor.name)
        if node is None or not node.is_dataset or node.file is not self.file:
            raise self.file.reject(f"{self.path} has no dataset {tensor.name!r}", fix)
        storage, dtype = node.storage(), numpy_dtype(tensor.dtype)
        found = storage.stored
        if isinstance(found, Stored):
            name: str = found.dtype
            same = name == dtype.name and found.little_endian
        else:
            name, same = found, storage.dtype == dtype.newbyteorder("<")
        fits = len(storage.shape) == len(tensor.shape) and all(
            want in (ANY, have) for want, have in zip(tensor.shape, storage.shape, strict=True)
        )
        if node.offset is None or not fits or not same:
            wanted = ", ".join("tokens" if dim == ANY else str(dim) for dim in tensor.shape)
            raise self.file.reject(
                f"{node.path} is {name} {list(storage.shape)}, {storage}; "
                f"want {dtype.name} [{wanted}], contiguous",
                fix,
            )
        return Region(node.offset, storage.shape, dtype, tensor.token_dim)

    def read_box(self, storage: Storage, start: Sequence[int], out: np.ndarray[Any, Any]) -> None:
        """Read the box of `out`'s shape that begins at `start`, bit by bit as it is stored.

        `storage` is what `storage` returned; `out` may have any strides.

        Raises
        ------
        ValueError, OSError, RejectedError
            The file is damaged, or can't be read.

        """
        if out.itemsize != storage.itemsize:
            raise ValueError(f"{storage.itemsize} bytes an element don't fit {out.dtype}")
        if storage.kind == "chunked" and all(f.code in DECODED_HERE for f in storage.filters):
            grid = [-(-n // step) for n, step in zip(storage.shape, storage.chunk, strict=True)]
            first = self._found["c"]
            table = self._main.chunks[first : first + prod(grid)].reshape(grid)
            read_chunks(table, self.file.fd, storage.chunk, storage.filters, start, out)
            return
        content = scanner.read_box(self.file.path, self._main.allow, self.path, start, out.shape)
        out[...] = np.frombuffer(content, out.dtype).reshape(out.shape)


def _storage(form: dict[str, Any], types: Sequence[dict[str, Any]]) -> Storage:
    """What datasets of a form have in common: all but their place."""
    stored, dtype = (types[form["type"]][name] for name in ("stored", "numpy"))
    return Storage(
        tuple(form["shape"]),
        form["itemsize"],
        form["kind"],
        tuple(form.get("chunk", ())),
        tuple(Filter(code, tuple(v), name) for code, v, name in form.get("filters", ())),
        stored if isinstance(stored, str) else Stored(*stored),
        None if dtype is None else np.dtype(dtype),
    )


def format_of(path: str) -> str:
    """Read the root attribute ``format`` of a file; empty when it is not HDF5 or has none."""
    try:
        with File(path, depth=0) as file:
            return str(file.root.attribute("format") or "")
    except RejectedError:
        return ""
