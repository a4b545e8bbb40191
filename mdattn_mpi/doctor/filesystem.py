"""The folder that the output is to lie in: what it is, and whether ranks can share a file there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from mdattn_mpi.lockstep import World

BLOCK = 8 << 20  # bytes that each rank writes and reads
# File systems that hold a file for one node only, or not for long.
LOCAL = {"tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "squashfs"}


def folder_facts(folder: str) -> dict[str, Any]:
    """Type, mount point, free space, stripes, and whether files can be locked."""
    path = Path(folder).resolve()
    facts: dict[str, Any] = {"path": str(path), "exists": path.is_dir()}
    if not path.is_dir():
        return facts
    facts["mount"], facts["type"] = mount_of(path)
    found = os.statvfs(path)
    facts["free"] = found.f_bavail * found.f_frsize
    facts["read_only"] = bool(found.f_flag & os.ST_RDONLY)
    facts["writable"] = os.access(path, os.W_OK | os.X_OK)
    facts["stripes"] = stripes(path) if facts["type"] == "lustre" else None
    return facts


def mount_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> tuple[str, str]:
    """Mount point and type of the file system that holds `path`."""
    best = ("/", "unknown")
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        if (path == Path(point) or Path(point) in path.parents) and len(point) >= len(best[0]):
            best = point, after.split()[0]
    return best


def stripes(path: Path) -> int | None:
    """Over how many servers Lustre spreads a new file here; None if it doesn't tell."""
    if not shutil.which("lfs"):
        return None
    done = subprocess.run(
        ["lfs", "getstripe", "-d", "-c", str(path)],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    with suppress(ValueError, IndexError):
        return int(done.stdout.split()[0])
    return None


def try_folder(world: World, folder: str) -> dict[str, Any]:
    """Collective. Write one file from all ranks, sync it, and read a neighbour's part of it.

    Returns
    -------
    dict
        On every rank its own experience: ``error`` in words, or seconds; ``shared`` says whether
        the file of rank 0 is there, ``right`` whether the neighbour's bytes are, ``locks`` whether
        locks work.

    """
    name = Path(folder).resolve() / f".mdattn-doctor-{world.job:016x}"
    facts: dict[str, Any] = {"error": "", "shared": False, "right": False, "locks": ""}
    world.board.enter("doctor: folder")
    if world.rank == 0:
        facts["error"] = _words(lambda: _make(name, world.size * BLOCK))
    world.barrier()
    file = -1
    try:
        facts["shared"] = name.exists()
        if facts["shared"]:
            file = os.open(name, os.O_RDWR)
            facts["locks"] = _words(lambda: _lock(file))
    except OSError as error:
        facts["error"] = facts["error"] or _said(error)
    mine, neighbour = world.rank, (world.rank + 1) % world.size
    start = perf_counter()
    if file >= 0 and not facts["error"]:
        facts["error"] = _words(lambda: _write(file, mine))
    facts["write_seconds"] = perf_counter() - start
    world.barrier()
    start = perf_counter()
    if file >= 0 and not facts["error"]:
        with suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            facts["right"] = os.pread(file, BLOCK, neighbour * BLOCK) == _bytes(neighbour)
    facts["read_seconds"] = perf_counter() - start
    if file >= 0:
        os.close(file)
    world.barrier()
    if world.rank == 0:
        name.unlink(missing_ok=True)
    return facts


def _make(name: Path, size: int) -> None:
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(file, 0, size)
        os.fsync(file)
    except OSError:
        name.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def _lock(file: int) -> None:
    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.lockf(file, fcntl.LOCK_UN)
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(file, fcntl.LOCK_UN)


def _write(file: int, rank: int) -> None:
    data, done = _bytes(rank), 0
    while done < BLOCK:
        done += os.pwrite(file, data[done:], rank * BLOCK + done)
    os.fdatasync(file)


def _bytes(rank: int) -> bytes:
    seed = hashlib.sha256(b"mdattn doctor %d" % rank).digest()
    return seed * (BLOCK // len(seed))


def _words(action: Any) -> str:
    """What went wrong in `action`; empty if nothing did."""
    try:
        action()
    except OSError as error:
        return _said(error)
    return ""


def _said(error: OSError) -> str:
    return error.strerror or str(error)
