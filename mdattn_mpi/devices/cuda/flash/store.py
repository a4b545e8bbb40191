"""Compiled kernels on disk: one process of a node compiles a key, the others wait and load it.

A file holds machine code that will be run, so the folder must be the user's own.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mdattn_mpi.devices.cuda.flash.key import KernelKey
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.files import is_private, whole_file

SYMBOL = "attend"
PATIENCE = 120.0  # seconds for another process to compile


class Store:
    """Compiled kernels in a folder.

    Parameters
    ----------
    folder
        Where; made if need be. One that can't be made or written is done without.
    versions
        Of everything that a compiled kernel depends on; our own sources are looked at here.

    Raises
    ------
    RejectedError
        Others may write into the folder, or it is somebody else's.

    """

    def __init__(self, folder: Path, versions: Mapping[str, str]) -> None:
        self._about = repr((sorted(versions.items()), platform.machine(), _own_sources()))
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(folder)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            self._temporary = tempfile.TemporaryDirectory(prefix="mdattn-flash-")
            folder = Path(self._temporary.name)
        self.folder = folder
        self.compiled = 0

    def path(self, key: KernelKey) -> Path:
        """Return the place of a kernel."""
        digest = hashlib.sha256(f"{self._about} {tuple(key)!r}".encode()).hexdigest()
        return self.folder / f"{digest[:40]}.o"

    def get(
        self, key: KernelKey, compile_kernel: Callable[[KernelKey], Any], load: Callable[[str], Any]
    ) -> Any:
        """Load the kernel of `key`; compile it if nobody has.

        Parameters
        ----------
        compile_kernel
            Gives what has ``export_to_c``.
        load
            Opens an object file and returns its function `SYMBOL`.

        """
        path = self.path(key)
        with _locked(path.with_suffix(".lock")):
            if path.exists():
                with suppress(Exception):  # cut short by a full disk, say: made anew
                    return load(str(path))
            self.compiled += 1
            kernel = compile_kernel(key)
            with whole_file(path) as new:
                kernel.export_to_c(object_file_path=str(new), function_name=SYMBOL)
        return load(str(path))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of this node; after `PATIENCE` go on without: files appear whole in any case."""
    with path.open("a") as file:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        yield


def _check_owner(folder: Path) -> None:
    if not is_private(folder):
        raise RejectedError(
            "others may write into the folder of compiled kernels, which are machine code",
            file=str(folder),
            fix=f"chmod 700 {folder}, or name a folder of your own by MDATTN_CACHE",
        )


def _own_sources() -> str:
    """Digest of the modules that decide what is compiled."""
    names = ("compiling.py", "sm90.py", "sm100.py")
    sources = (Path(__file__).with_name(name).read_bytes() for name in names)
    return hashlib.sha256(b"".join(sources)).hexdigest()
