"""HDF5 files as HDF5 sees them: one path component at a time, nothing outside unless allowed.

HDF5 follows links, maps datasets into other files and loads plugins by itself. A file from somebody
else could so read whatever its reader can read. Here every link is looked at before it is followed,
every dataset's storage before its extent is asked for, and no size that a header claims is believed
before it has been compared with the size of the file. Only `mdattn_mpi.dataset.scan` comes here: a
process that may crash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from math import prod
from typing import Any

import h5py
import numpy as np

from mdattn_mpi.dataset.chunks import CHUNK
from mdattn_mpi.dataset.hdf5 import Value
from mdattn_mpi.dataset.kinds import kind_of
from mdattn_mpi.dataset.layout import (
    MAX_ATTRIBUTE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_COMPRESSION,
    MAX_LINK_DEPTH,
    shown,
)
from mdattn_mpi.dataset.scanner import DAMAGED
from mdattn_mpi.errors import RejectedError

Array = np.ndarray[Any, np.dtype[Any]]
Record = dict[str, Any]

MAX_NUMBERS = 1024  # in an attribute

_FILTERS = {  # what libhdf5 and h5py bring along; anything else would be a plugin
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_SZIP: "szip",
    h5py.h5z.FILTER_NBIT: "nbit",
    h5py.h5z.FILTER_SCALEOFFSET: "scaleoffset",
    h5py.h5z.FILTER_LZF: "lzf",
}


class Source:
    """An HDF5 file as HDF5 sees it, and those that its links led to."""

    def __init__(self, path: str, allow: Sequence[str]) -> None:
        self.path = path
        self.allow = allow
        self.linked: dict[str, Source] = {}
        self.id = self._open()
        self.size = os.fstat(self.id.get_vfd_handle()).st_size

    def _open(self) -> Any:
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        access.set_file_locking(False, True)  # ranks write beside us, and Lustre may have no locks
        try:
            return h5py.h5f.open(os.fsencode(self.path), h5py.h5f.ACC_RDONLY, access)
        except Exception as error:
            reason = str(error)
            if "signature" in reason:
                kind = kind_of(self.path)
                what, fix = f"is not an HDF5 file: it is {kind.name}", kind.fix
            elif "truncated" in reason:
                what, fix = "is truncated: it is shorter than its header says", "copy it again"
            elif isinstance(error, PermissionError):
                what, fix = "can't be opened: permission denied", "check who may read it"
            else:
                what, fix = f"HDF5 can't open it ({reason})", DAMAGED
            raise RejectedError(what, fix=fix, file=self.path) from None

    def close(self) -> None:
        """Close this file and those that links led to."""
        for source in self.linked.values():
            source.close()
        self.id.close()

    @property
    def root(self) -> Object:
        """The root group."""
        return Object(self, h5py.h5o.open(self.id, b"/"), "/")

    def reject(self, what: str, fix: str) -> RejectedError:
        """Make an error about this file."""
        return RejectedError(what, fix=fix, file=self.path)

    def wrap(self, error: Exception, place: str) -> RejectedError:
        """Turn whatever h5py raises, in many classes, into one error about this file."""
        if isinstance(error, RejectedError):
            return error
        return self.reject(f"HDF5 can't read {shown(place)} ({error})", DAMAGED)

    def link(self, target: str, why: str) -> Source:
        """Open another file that this one refers to, if that is allowed."""
        path = self.allowed(target, why)
        if path == os.path.realpath(self.path):
            return self
        if path not in self.linked:
            if len(self.linked) >= MAX_LINK_DEPTH:
                raise self.reject(
                    f"refers to more than {MAX_LINK_DEPTH} other files", "copy them into one"
                )
            if not os.path.isfile(path):
                raise self.reject(
                    f"{why} leads to {shown(target)}: no such file", "copy that file too"
                )
            self.linked[path] = Source(path, self.allow)
        return self.linked[path]

    def allowed(self, target: str, why: str) -> str:
        """Resolve a path that this file names, relative to its own folder.

        Raises
        ------
        RejectedError
            It isn't in an allowed folder.

        """
        path = os.path.realpath(os.path.join(os.path.dirname(os.path.realpath(self.path)), target))
        for folder in self.allow:
            if os.path.commonpath((folder, path)) == folder:
                return path
        raise self.reject(
            f"{why} leads to another file, {shown(target)}",
            f"if you trust it, allow its folder: --allow {shown(os.path.dirname(path))}",
        )


class Object:
    """A group or dataset of a file, reached safely. `path` is where a link led."""

    def __init__(self, source: Source, id: Any, path: str) -> None:
        self.source = source
        self.id = id
        self.path = path

    @cached_property
    def type(self) -> Any:
        """What the elements of a dataset are."""
        return self.id.get_type()

    def links(self, limit: int) -> dict[str, int]:
        """List the children's names, unsorted, and of which kind each link is.

        Raises
        ------
        RejectedError
            More than `limit`, or more than the file has room for.

        """
        found: dict[str, int] = {}
        room = min(limit, self.source.size)

        def take(name: bytes, about: Any) -> bool:
            found[os.fsdecode(name) if isinstance(name, bytes) else name] = about.type
            return len(found) > room

        self.id.links.iterate(take, info=True)
        if len(found) > room:
            raise self.source.reject(f"{self.path} has more than {room} entries", "split the file")
        return found

    def child(self, name: str, kind: int | None = None, depth: int = 0) -> Object | None:
        """Open one child, whose link is of a known kind or not; None where there is none.

        Raises
        ------
        RejectedError
            A link that leaves the file, and isn't allowed to; a damaged object.

        """
        path = f"{self.path.rstrip('/')}/{name}"
        if depth > MAX_LINK_DEPTH:
            raise self.source.reject(f"links at {shown(path)} go round in circles", DAMAGED)
        key = os.fsencode(name)
        kind = self._link_type(key) if kind is None else kind
        if kind is None:
            return None
        if kind == h5py.h5l.TYPE_HARD:
            return Object(self.source, h5py.h5o.open(self.id, key), path)
        target = self.id.links.get_val(key)
        if kind == h5py.h5l.TYPE_SOFT and isinstance(target, bytes):
            start = self.source.root if target.startswith(b"/") else self
            return start.walk(os.fsdecode(target), depth + 1)
        if kind == h5py.h5l.TYPE_EXTERNAL and isinstance(target, tuple):
            other = self.source.link(os.fsdecode(target[0]), f"the external link {shown(path)}")
            return other.root.walk(os.fsdecode(target[1]), depth + 1)
        raise self.source.reject(f"{shown(path)} is a link of an unknown kind", "copy the data")

    def _link_type(self, key: bytes) -> int | None:
        """Of which kind a link is; None where there is none."""
        if not isinstance(self.id, h5py.h5g.GroupID):
            return None
        try:
            return int(self.id.links.get_info(key).type)
        except Exception:
            if key in self.id:
                raise
            return None

    def walk(self, path: str, depth: int = 0) -> Object | None:
        """Open what `path` leads to from here, one component at a time."""
        node: Object | None = self
        for name in path.split("/"):
            if name not in ("", ".") and node is not None:
                node = node.child(name, None, depth)
        return node

    def attributes(self) -> Record:
        """Read all attributes: text, numbers, or what is wrong with one."""
        if not h5py.h5a.get_num_attrs(self.id):
            return {}
        names: list[bytes] = []
        h5py.h5a.iterate(self.id, names.append)
        return {os.fsdecode(name): self._attribute(name) for name in names}

    def _attribute(self, name: bytes) -> Value | list[int] | Record:
        try:
            found = h5py.h5a.open(self.id, name)
            stored = found.get_type()
            dtype = _dtype_of(stored.encode())
            size = found.get_storage_size()
            if dtype is not None and size <= min(MAX_ATTRIBUTE_BYTES, self.source.size):
                if (prod(found.shape) == 1) if dtype.hasobject else size == dtype.itemsize:
                    return _read_one(found, stored, dtype)
                numbered = dtype.kind in "iu" and size <= MAX_NUMBERS * dtype.itemsize
                if numbered and len(found.shape) == 1:
                    numbers = np.empty(found.shape, dtype)
                    found.read(numbers)
                    return [int(number) for number in numbers]
        except Exception as error:
            place = f"attribute {os.fsdecode(name)} of {self.path}"
            return fault(self.source.wrap(error, place))
        return fault(
            self.source.reject(
                f"attribute {shown(os.fsdecode(name))} of {self.path} is neither text nor one "
                "number",
                "correct the attribute",
            )
        )

    def storage(self, table: Callable[[Array], int]) -> tuple[Record, Record]:
        """Say where the elements are, with every claim of the header checked.

        Returns
        -------
        form, place
            What datasets of a kind have in common, and what they don't.

        Raises
        ------
        RejectedError
            Storage outside the file that isn't allowed, elements that were never written, or
            more of them than the file can hold.

        """
        offset = self.id.get_offset()
        if offset is None:  # not one run inside this file, or nothing at all
            created = self.id.get_create_plist()
            layout = created.get_layout()
            if layout == h5py.h5d.VIRTUAL:
                self._check_virtual(created)
            external = created.get_external_count()
            if external:
                self._check_external(created, external)
        shape = [int(n) for n in self.id.get_space().get_simple_extent_dims()]
        form: Record = {"shape": shape, "itemsize": int(self.type.get_size())}
        if offset is not None:
            return {**form, "kind": "contiguous"}, {"o": self._fits(form, int(offset))}
        if layout == h5py.h5d.CHUNKED:
            return self._chunked({**form, "kind": "chunked"}, created, table)
        if layout == h5py.h5d.VIRTUAL or external:
            return {**form, "kind": "external" if external else "virtual"}, {}
        if layout == h5py.h5d.COMPACT:
            return {**form, "kind": "compact"}, {}
        if prod(shape):
            raise self.source.reject(f"{self.path} was never written", "write it, or leave it out")
        return {**form, "kind": "contiguous"}, {"o": 0}

    def _fits(self, form: Record, offset: int) -> int:
        nbytes = prod(form["shape"]) * form["itemsize"]
        if offset + nbytes > self.source.size:
            raise self.source.reject(
                f"{self.path} claims {nbytes} bytes at {offset}, "
                f"but the file has {self.source.size} in all",
                "the file is truncated or damaged: copy it again",
            )
        return offset

    def _chunked(
        self, form: Record, created: Any, table: Callable[[Array], int]
    ) -> tuple[Record, Record]:
        chunk = [int(n) for n in created.get_chunk()]
        chunk_bytes = prod(chunk) * form["itemsize"]
        nbytes = prod(form["shape"]) * form["itemsize"]
        grid = [-(-extent // step) for extent, step in zip(form["shape"], chunk, strict=True)]
        form |= {"chunk": chunk, "filters": list(self._filters(created))}
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise self.source.reject(
                f"{self.path} has chunks of {chunk_bytes} bytes",
                f"use chunks of at most {MAX_CHUNK_BYTES} bytes",
            )
        if prod(grid) > self.source.size or nbytes > self.source.size * MAX_COMPRESSION:
            raise self.source.reject(
                f"{self.path} claims {nbytes} bytes in {prod(grid)} chunks, "
                f"but the file has {self.source.size} in all",
                DAMAGED,
            )
        present = int(self.id.get_num_chunks())
        if present != prod(grid):
            raise self.source.reject(
                f"{self.path} has {present} of its {prod(grid)} chunks", "write all of it"
            )
        return form, {"c": table(self._chunks(chunk, grid))}

    def _chunks(self, chunk: Sequence[int], grid: Sequence[int]) -> Array:
        """Where every chunk is, in the order of the grid."""
        found = np.zeros(grid, CHUNK)

        def take(about: Any) -> None:
            corner = tuple(at // step for at, step in zip(about.chunk_offset, chunk, strict=True))
            found[corner] = (about.byte_offset, about.size, about.filter_mask)

        if found.size:
            self.id.chunk_iter(take)
        size = np.uint64(self.source.size)
        room = size - np.minimum(found["offset"], size)
        if np.any((found["size"] == 0) | (found["size"] > room)):
            raise ValueError("some of its chunks are nowhere in the file")
        return found.reshape(-1)

    def _filters(self, created: Any) -> Iterator[tuple[int, list[int], str]]:
        for position in range(created.get_nfilters()):
            code, _, values, label = created.get_filter(position)
            if code not in _FILTERS and not (self.source.allow and h5py.h5z.filter_avail(code)):
                raise self.source.reject(
                    f"{self.path} is compressed by filter {code} ({shown(os.fsdecode(label))}), "
                    "which needs a plugin",
                    "rewrite it with gzip or uncompressed, or allow the folder of the plugin",
                )
            yield code, [int(value) for value in values], _FILTERS.get(code, f"filter {code}")

    def _check_virtual(self, created: Any) -> None:
        self._no_prefix("HDF5_VDS_PREFIX")
        for position in range(min(created.get_virtual_count(), self.source.size)):
            name = created.get_virtual_filename(position)
            if name != ".":
                self.source.allowed(name, f"the virtual dataset {self.path}")
            if "%" in name:
                raise self.source.reject(
                    f"the virtual dataset {self.path} names its files by a pattern", "copy the data"
                )

    def _check_external(self, created: Any, count: int) -> None:
        self._no_prefix("HDF5_EXTFILE_PREFIX")
        for position in range(min(count, self.source.size)):
            name = os.fsdecode(created.get_external(position)[0])
            path = self.source.allowed(name, f"the external storage of {self.path}")
            if not os.path.isfile(path):
                raise self.source.reject(
                    f"{self.path} is stored in {shown(name)}: no such file", "copy that file too"
                )

    def _no_prefix(self, variable: str) -> None:
        if os.environ.get(variable):  # would send HDF5 to other files than those checked here
            raise self.source.reject(f"{self.path} lies in other files", f"unset {variable}")

    def read_box(self, start: Sequence[int], count: Sequence[int]) -> Array:
        """Read a box as it is stored: there is nothing to convert."""
        space = self.id.get_space()
        box = np.empty(prod(count), np.dtype((np.void, self.type.get_size())))
        space.select_hyperslab(tuple(start), tuple(count))
        self.id.read(h5py.h5s.create_simple((box.size,)), space, box, self.type)
        return box


@cache
def _dtype_of(encoded: bytes) -> Any:
    """The NumPy dtype of an HDF5 type, if it is one of text or numbers."""
    stored = h5py.h5t.decode(encoded)
    kind = stored.get_class()
    known = kind in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT)
    boolean = kind == h5py.h5t.ENUM and stored.dtype == np.bool_  # as h5py stores it
    return stored.dtype if known or boolean else None


def _read_one(attribute: Any, stored: Any, dtype: Any) -> Value:
    """Read a single value; what has a fixed length isn't converted."""
    value = np.empty((1,) * len(attribute.shape) if dtype.hasobject else (), dtype)
    attribute.read(value, *(() if dtype.hasobject else (stored,)))
    plain: Any = value.reshape(-1)[0]
    if isinstance(plain, bytes):
        return plain.decode(errors="surrogateescape")
    found: Value = plain if isinstance(plain, str) else plain.item()
    return found


def fault(error: RejectedError) -> Record:
    """Describe what is wrong in a catalog."""
    return {"fault": [error.what, error.fix, error.file]}
