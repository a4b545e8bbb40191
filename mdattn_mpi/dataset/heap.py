"""Text attributes of variable length, found in the file without HDF5's help.

This is how h5py stores text unless told otherwise. The text lies in a "global heap", which has no
checksum, and in which HDF5 loops for ever, or allocates and clears 4 GiB, when a byte is wrong. The
way there is short and documented (HDF5 File Format Specification, IV.A.1 and III.E): the messages
of the object's header, among them the attribute, which names a heap and an index.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

ATTRIBUTE, CONTINUATION = 0x0C, 0x10  # types of message
SHARED = 0x02  # a flag of a message: its content is elsewhere
MAX_HEADER_BYTES = 1 << 20
MAX_BLOCKS = 64


def text_attribute(fd: int, base: int, header: int, name: bytes, limit: int) -> bytes | None:
    """Read the single text of variable length that is an attribute's value.

    None when the attribute isn't in the object's header: where there are many (more than 8, by
    HDF5's default), they are elsewhere, behind checksums.

    Parameters
    ----------
    fd
        The file; its addresses and lengths take 8 bytes.
    base, header
        Where its addresses count from, and the address of the object's header.
    name
        The attribute.
    limit
        Bytes that the text may have.

    Raises
    ------
    ValueError
        It is damaged, or too long.

    """
    for kind, flags, content in _messages(fd, base, header):
        if kind == ATTRIBUTE and not flags & SHARED:
            found, value = _attribute(content)
            if found == name and len(value) == 16:
                length, heap, index = struct.unpack("<IQI", value)
                if length > limit:
                    raise ValueError(f"it claims {length} bytes")
                return _heap_object(fd, base + heap, index, limit)[:length]
    return None


def _read(fd: int, offset: int, count: int) -> bytes:
    if not (0 <= offset < 1 << 62 and 0 <= count <= MAX_HEADER_BYTES):
        raise ValueError(f"{count} bytes at {offset} make no sense")
    data = os.pread(fd, count, offset)
    if len(data) != count:
        raise ValueError(f"the file ends before byte {offset + count}")
    return data


def _messages(fd: int, base: int, header: int) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and content of every message of an object header, version 1 or 2."""
    start = _read(fd, base + header, 16)
    modern = start[:4] == b"OHDR"
    block, order = _first_block_2(fd, base + header) if modern else (_first_block_1(start), 0)
    blocks = [(base + header + block[0], block[1])]
    for number, (offset, length) in enumerate(blocks):  # grows while it is gone through
        if number >= MAX_BLOCKS:
            raise ValueError("its header has too many blocks")
        data = _read(fd, offset, length)
        if modern and number:
            data = data[4:]  # "OCHK"
        for kind, flags, content in _messages_of_block(data, modern, order):
            if kind == CONTINUATION and len(content) >= 16:
                where, size = struct.unpack_from("<QQ", content)
                blocks.append((base + where, size - 4 if modern else size))
            yield kind, flags, content


def _first_block_1(start: bytes) -> tuple[int, int]:
    if start[0] != 1:
        raise ValueError("its header has an unknown version")
    return 16, struct.unpack_from("<I", start, 8)[0]


def _first_block_2(fd: int, header: int) -> tuple[tuple[int, int], int]:
    start = _read(fd, header, 6)
    flags = start[5]
    at = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(_read(fd, header + at, width), "little")
    return (at + width, length), 2 if flags & 0x04 else 0


def _messages_of_block(data: bytes, modern: bool, order: int) -> Iterator[tuple[int, int, bytes]]:
    at, prefix = 0, 4 + order if modern else 8
    while at + prefix <= len(data):
        kind, size, flags = struct.unpack_from("<BHB" if modern else "<HHB", data, at)
        at += prefix
        yield kind, flags, data[at : at + size]
        at += size


def _attribute(content: bytes) -> tuple[bytes, bytes]:
    """Name and raw value of an attribute message."""
    if len(content) < 9 or content[0] not in (1, 2, 3):
        return b"", b""
    version = content[0]
    sizes = struct.unpack_from("<HHH", content, 2)
    at = 9 if version == 3 else 8
    name = content[at : at + sizes[0]].rstrip(b"\0")
    at += sum(-(-size // 8) * 8 if version == 1 else size for size in sizes)
    return name, content[at : at + 16]


def _heap_object(fd: int, heap: int, index: int, limit: int) -> bytes:
    """One object of a global heap collection."""
    signature, version, size = struct.unpack("<4sB3xQ", _read(fd, heap, 16))
    if signature != b"GCOL" or version != 1:
        raise ValueError(f"there is no heap at {heap}")
    at, stop = 16, min(size, MAX_HEADER_BYTES)
    while at + 16 <= stop:
        number, length = struct.unpack("<H6xQ", _read(fd, heap + at, 16))
        if number == index and index:
            if length > min(limit, size):
                raise ValueError(f"it claims {length} bytes")
            return _read(fd, heap + at + 16, length)
        if number == 0 or length > size:
            break
        at += 16 + -(-length // 8) * 8
    raise ValueError(f"the heap at {heap} has no object {index}")
