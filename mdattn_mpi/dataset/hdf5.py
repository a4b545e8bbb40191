"""The only way into an HDF5 file: one path component at a time, nothing outside unless allowed.

HDF5 follows links, maps datasets into other files and loads plugins by itself. A file from somebody
else could so read whatever its reader can read. Here every link is looked at before it is followed,
every dataset's storage before its extent is asked for, and no size that a header claims is believed
before it has been compared with the size of the file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import h5py
import numpy as np

from mdattn_mpi.dataset.chunks import DECODED_HERE, Filter, read_chunks
from mdattn_mpi.dataset.heap import text_attribute
from mdattn_mpi.dataset.kinds import kind_of
from mdattn_mpi.dataset.layout import (
    MAX_ATTRIBUTE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_COMPRESSION,
    MAX_LINK_DEPTH,
    shown,
)
from mdattn_mpi.errors import MdattnError, RejectedError

Value = str | int | float

_DAMAGED = "the file is damaged: copy it again, or make it anew"
_FILTERS = {  # what libhdf5 and h5py bring along; anything else would be a plugin
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_SZIP: "szip",
    h5py.h5z.FILTER_NBIT: "nbit",
    h5py.h5z.FILTER_SCALEOFFSET: "scaleoffset",
    h5py.h5z.FILTER_LZF: "lzf",
}


@dataclass(frozen=True)
class Storage:
    """Where the elements of a dataset are. `offset` is None when only HDF5 can read them."""

    shape: tuple[int, ...]
    itemsize: int
    kind: Literal["contiguous", "compact", "chunked", "virtual", "external"]
    offset: int | None = None
    chunk: tuple[int, ...] = ()
    filters: tuple[Filter, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, uncompressed."""
        return prod(self.shape) * self.itemsize

    def __str__(self) -> str:
        """For example ``chunked 64×8×128, gzip``."""
        chunk = " " + "×".join(map(str, self.chunk)) if self.chunk else ""
        return ", ".join((self.kind + chunk, *(step.name for step in self.filters)))


class File:
    """An HDF5 file, opened for reading; holds a file descriptor for `os.preadv` too.

    Parameters
    ----------
    path
        A regular file.
    allow
        Folders that links, virtual datasets and external storage may lead to, and that filter
        plugins may come from.

    Raises
    ------
    RejectedError
        No such file, not HDF5, truncated, damaged.

    """

    def __init__(self, path: str | os.PathLike[str], allow: Sequence[str] = ()) -> None:
        self.path = os.fspath(path)
        self.allow = tuple(os.path.realpath(folder) for folder in allow)
        self._linked: dict[str, File] = {}
        must_be_regular(self.path)
        drop_plugins(self.allow)
        self.id = self._open()
        with self.guard("/"):
            self.fd = os.dup(self.id.get_vfd_handle())
        self.size = os.fstat(self.fd).st_size

    def _open(self) -> Any:
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        access.set_file_locking(False, True)  # ranks write beside us, and Lustre may have no locks
        name = os.fsencode(self.path)
        try:
            try:
                return h5py.h5f.open(name, h5py.h5f.ACC_RDONLY, access)
            except OSError as error:
                if "locking flag" not in str(error):
                    raise
                return h5py.h5f.open(name, h5py.h5f.ACC_RDONLY)  # as this process has it open
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
                what, fix = f"HDF5 can't open it ({reason})", _DAMAGED
            raise RejectedError(what, fix=fix, file=self.path) from None

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this file and those that links led to."""
        self.release()
        for file in self._linked.values():
            file.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def release(self) -> None:
        """Let go of HDF5's handles; the file descriptors stay open."""
        for file in self._linked.values():
            file.release()
        if self.id.valid:
            self.id.close()

    @property
    def root(self) -> Node:
        """The root group."""
        with self.guard("/"):
            return Node(self, h5py.h5o.open(self.id, b"/"), "/")

    def reject(self, what: str, fix: str) -> RejectedError:
        """Make an error about this file."""
        return RejectedError(what, fix=fix, file=self.path)

    @contextmanager
    def guard(self, place: str) -> Iterator[None]:
        """Turn whatever h5py raises, in many classes, into one error about this file."""
        try:
            yield
        except MdattnError:
            raise
        except Exception as error:
            raise self.reject(f"HDF5 can't read {shown(place)} ({error})", _DAMAGED) from None

    def linked(self, target: str, why: str) -> File:
        """Open another file that this one refers to, if that is allowed."""
        path = self.allowed(target, why)
        if path == os.path.realpath(self.path):
            return self
        if path not in self._linked:
            if len(self._linked) >= MAX_LINK_DEPTH:
                raise self.reject(
                    f"refers to more than {MAX_LINK_DEPTH} other files", "copy them into one"
                )
            self._linked[path] = File(path, self.allow)
        return self._linked[path]

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


def must_be_regular(path: str) -> None:
    """Refuse a path that leads to no regular file: opening a pipe could wait for ever.

    Raises
    ------
    RejectedError
        It isn't there, or is something else.

    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RejectedError(f"can't be opened: {reason}", fix="check the path", file=path) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise RejectedError(f"is {kind}", fix="name a file", file=path)


@dataclass(frozen=True)
class Node:
    """A group or dataset of a file, reached safely. `path` is for messages."""

    file: File
    id: Any
    path: str

    @property
    def is_group(self) -> bool:
        """Whether it has children."""
        return isinstance(self.id, h5py.h5g.GroupID)

    @property
    def is_dataset(self) -> bool:
        """Whether it has elements."""
        return isinstance(self.id, h5py.h5d.DatasetID)

    @property
    def address(self) -> tuple[int, int]:
        """The same for the same object, by whatever path it was reached."""
        with self.file.guard(self.path):
            about = h5py.h5o.get_info(self.id)
            return about.fileno, about.addr

    def names(self, limit: int) -> list[str]:
        """List the children's names, unsorted.

        Raises
        ------
        RejectedError
            More than `limit`, or more than the file has room for.

        """
        found: list[str] = []
        room = min(limit, self.file.size)

        def take(name: bytes) -> bool:
            found.append(os.fsdecode(name) if isinstance(name, bytes) else name)
            return len(found) > room

        with self.file.guard(self.path):
            self.id.links.iterate(take)
        if len(found) > room:
            raise self.file.reject(f"{self.path} has more than {room} entries", "split the file")
        return found

    def child(self, name: str, depth: int = 0) -> Node | None:
        """Open one child; None where there is none.

        Raises
        ------
        RejectedError
            A link that leaves the file, and isn't allowed to; a damaged object.

        """
        path = f"{self.path.rstrip('/')}/{name}"
        if depth > MAX_LINK_DEPTH:
            raise self.file.reject(f"links at {shown(path)} go round in circles", _DAMAGED)
        key = os.fsencode(name)
        with self.file.guard(path):
            kind = self._link_type(key)
            if kind is None:
                return None
            if kind == h5py.h5l.TYPE_HARD:
                return Node(self.file, h5py.h5o.open(self.id, key), path)
            target = self.id.links.get_val(key)
        if kind == h5py.h5l.TYPE_SOFT and isinstance(target, bytes):
            start = self.file.root if target.startswith(b"/") else self
            return start.walk(os.fsdecode(target), depth + 1)
        if kind == h5py.h5l.TYPE_EXTERNAL and isinstance(target, tuple):
            other = self.file.linked(os.fsdecode(target[0]), f"the external link {shown(path)}")
            return other.root.walk(os.fsdecode(target[1]), depth + 1)
        raise self.file.reject(f"{shown(path)} is a link of an unknown kind", "copy the data")

    def _link_type(self, key: bytes) -> int | None:
        """Of which kind a link is; None where there is none."""
        if not self.is_group:
            return None
        try:
            return int(self.id.links.get_info(key).type)
        except Exception:
            if key in self.id:
                raise
            return None

    def walk(self, path: str, depth: int = 0) -> Node | None:
        """Open what `path` leads to from here, one component at a time."""
        node: Node | None = self
        for name in path.split("/"):
            if name not in ("", ".") and node is not None:
                node = node.child(name, depth)
        return node

    def attribute(self, name: str) -> Value | None:
        """Read an attribute: text, or one number; None where there is none.

        Raises
        ------
        RejectedError
            It is of another kind, or too large.

        """
        place = f"attribute {name} of {self.path}"
        with self.file.guard(place):
            if not h5py.h5a.exists(self.id, os.fsencode(name)):
                return None
            found = h5py.h5a.open(self.id, os.fsencode(name))
            single = prod(found.shape) == 1
            kind = found.get_type().get_class()
            size = found.get_storage_size()
            known = kind in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT)
            known = known or found.dtype == np.bool_  # which h5py makes an enum
            if single and known and size <= min(MAX_ATTRIBUTE_BYTES, self.file.size):
                text = self._text(name, found)
                if text is not None:
                    return text
                value = np.empty(found.shape, found.dtype)
                found.read(value)
                return _plain(value.reshape(-1)[0])
        raise self.file.reject(f"{place} is neither text nor one number", "correct the attribute")

    def numbers(self, name: str, count: int) -> tuple[int, ...] | None:
        """Read an attribute of `count` integers; None where there is none of that kind."""
        with self.file.guard(f"attribute {name} of {self.path}"):
            if not h5py.h5a.exists(self.id, os.fsencode(name)):
                return None
            found = h5py.h5a.open(self.id, os.fsencode(name))
            if found.shape != (count,) or found.dtype.kind not in "iu":
                return None
            values = np.empty(count, found.dtype)
            found.read(values)
            return tuple(int(value) for value in values)

    def _text(self, name: str, attribute: Any) -> str | None:
        """Read text of variable length, where that can be done without HDF5."""
        stored = attribute.get_type()
        if not isinstance(stored, h5py.h5t.TypeStringID) or not stored.is_variable_str():
            return None
        made = self.file.id.get_create_plist()
        if made.get_sizes() != (8, 8):
            raise ValueError("its addresses don't have 8 bytes")
        header = h5py.h5o.get_info(self.id).addr
        text = text_attribute(
            self.file.fd, made.get_userblock(), header, os.fsencode(name), MAX_ATTRIBUTE_BYTES
        )
        return None if text is None else text.rstrip(b"\0").decode(errors="surrogateescape")

    def attribute_names(self) -> list[str]:
        """List the names of all attributes."""
        with self.file.guard(self.path):
            return [
                os.fsdecode(h5py.h5a.open(self.id, index=i).get_name())
                for i in range(min(h5py.h5a.get_num_attrs(self.id), self.file.size))
            ]

    def attributes(self) -> dict[str, Value]:
        """Read all attributes; those that are neither text nor one number are left out."""
        values: dict[str, Value] = {}
        for name in self.attribute_names():
            try:
                value = self.attribute(name)
            except RejectedError:
                continue
            if value is not None:
                values[name] = value
        return values

    def storage(self) -> Storage:
        """Say where the elements are, with every claim of the header checked.

        Raises
        ------
        RejectedError
            Storage outside the file that isn't allowed, elements that were never written, or
            more of them than the file can hold.

        """
        with self.file.guard(self.path):
            created = self.id.get_create_plist()
            layout = created.get_layout()
            if layout == h5py.h5d.VIRTUAL:
                self._check_virtual(created)
            external = created.get_external_count()
            if external:
                self._check_external(created, external)
            shape = tuple(int(n) for n in self.id.get_space().get_simple_extent_dims())
            itemsize = int(self.id.get_type().get_size())
            if layout == h5py.h5d.VIRTUAL:
                return Storage(shape, itemsize, "virtual")
            if external:
                return Storage(shape, itemsize, "external")
            if layout == h5py.h5d.CHUNKED:
                return self._chunked(created, shape, itemsize)
            if layout == h5py.h5d.COMPACT:
                return Storage(shape, itemsize, "compact")
            return self._contiguous(shape, itemsize)

    def read_box(self, storage: Storage, start: Sequence[int], out: np.ndarray[Any, Any]) -> None:
        """Read the box of `out`'s shape that begins at `start`, bit by bit as it is stored.

        Parameters
        ----------
        storage
            What `storage` returned.
        start
            Where the box begins; it lies within the dataset.
        out
            What to fill; any strides, of as many bytes an element as the file has.

        Raises
        ------
        Exception
            Of any class: the file is damaged, or can't be read.

        """
        if out.itemsize != storage.itemsize:
            raise ValueError(f"{storage.itemsize} bytes an element don't fit {out.dtype}")
        if storage.kind == "chunked" and all(f.code in DECODED_HERE for f in storage.filters):
            read_chunks(self.id, self.file.fd, storage.chunk, storage.filters, start, out)
            return
        space = self.id.get_space()
        space.select_hyperslab(tuple(start), out.shape)
        box = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        memory = h5py.h5s.create_simple((out.size,))
        self.id.read(memory, space, box.reshape(-1), self.id.get_type())  # nothing to convert
        if box is not out:
            out[...] = box

    def _contiguous(self, shape: tuple[int, ...], itemsize: int) -> Storage:
        nbytes = prod(shape) * itemsize
        offset = self.id.get_offset()
        if nbytes == 0:
            return Storage(shape, itemsize, "contiguous", 0)
        if offset is None:
            raise self.file.reject(f"{self.path} was never written", "write it, or leave it out")
        if offset + nbytes > self.file.size:
            raise self.file.reject(
                f"{self.path} claims {nbytes} bytes at {offset}, "
                f"but the file has {self.file.size} in all",
                "the file is truncated or damaged: copy it again",
            )
        return Storage(shape, itemsize, "contiguous", int(offset))

    def _chunked(self, created: Any, shape: tuple[int, ...], itemsize: int) -> Storage:
        chunk = tuple(int(n) for n in created.get_chunk())
        nbytes = prod(shape) * itemsize
        wanted = prod(-(-extent // step) for extent, step in zip(shape, chunk, strict=True))
        filters = tuple(self._filters(created))
        if prod(chunk) * itemsize > MAX_CHUNK_BYTES:
            raise self.file.reject(
                f"{self.path} has chunks of {prod(chunk) * itemsize} bytes",
                f"use chunks of at most {MAX_CHUNK_BYTES} bytes",
            )
        if wanted > self.file.size or nbytes > self.file.size * MAX_COMPRESSION:
            raise self.file.reject(
                f"{self.path} claims {nbytes} bytes in {wanted} chunks, "
                f"but the file has {self.file.size} in all",
                _DAMAGED,
            )
        present = int(self.id.get_num_chunks())
        if present != wanted:
            raise self.file.reject(
                f"{self.path} has {present} of its {wanted} chunks", "write all of it"
            )
        return Storage(shape, itemsize, "chunked", None, chunk, filters)

    def _filters(self, created: Any) -> Iterator[Filter]:
        for position in range(created.get_nfilters()):
            code, _, values, label = created.get_filter(position)
            if code not in _FILTERS and not (self.file.allow and h5py.h5z.filter_avail(code)):
                raise self.file.reject(
                    f"{self.path} is compressed by filter {code} ({shown(os.fsdecode(label))}), "
                    "which needs a plugin",
                    "rewrite it with gzip or uncompressed, or allow the folder of the plugin",
                )
            name = _FILTERS.get(code, f"filter {code}")
            yield Filter(code, tuple(int(value) for value in values), name)

    def _check_virtual(self, created: Any) -> None:
        self._no_prefix("HDF5_VDS_PREFIX")
        for position in range(min(created.get_virtual_count(), self.file.size)):
            name = created.get_virtual_filename(position)
            if name != ".":
                self.file.allowed(name, f"the virtual dataset {self.path}")
            if "%" in name:
                raise self.file.reject(
                    f"the virtual dataset {self.path} names its files by a pattern", "copy the data"
                )

    def _check_external(self, created: Any, count: int) -> None:
        self._no_prefix("HDF5_EXTFILE_PREFIX")
        for position in range(min(count, self.file.size)):
            name = os.fsdecode(created.get_external(position)[0])
            path = self.file.allowed(name, f"the external storage of {self.path}")
            if not os.path.isfile(path):
                raise self.file.reject(
                    f"{self.path} is stored in {shown(name)}: no such file", "copy that file too"
                )

    def _no_prefix(self, variable: str) -> None:
        if os.environ.get(variable):  # would send HDF5 to other files than those checked here
            raise self.file.reject(f"{self.path} lies in other files", f"unset {variable}")


def format_of(path: str) -> str:
    """Read the root attribute ``format`` of a file; empty when it is not HDF5 or has none."""
    try:
        with File(path) as file:
            return str(file.root.attribute("format") or "")
    except RejectedError:
        return ""


def drop_plugins(allow: Sequence[str]) -> None:
    """Take every folder that isn't allowed off HDF5's search path for filter plugins.

    The path belongs to the process: nothing that runs later in it finds plugins there either.
    """
    for position in reversed(range(h5py.h5pl.size())):
        folder = os.path.realpath(os.fsdecode(h5py.h5pl.get(position)))
        if not any(os.path.commonpath((root, folder)) == root for root in allow):
            h5py.h5pl.remove(position)


def _plain(value: Any) -> Value:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, str):
        return value
    plain: Value = value.item()
    return plain
