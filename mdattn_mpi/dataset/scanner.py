"""Asking a child process what an HDF5 file holds.

The child is `mdattn_mpi.dataset.scan`. It is started when it is first needed, serves one request
after the other, and ends when this process does or has asked nothing for a while. Its environment
is free of the launcher's variables: to MPI it isn't there.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from mdattn_mpi.dataset.kinds import must_be_regular
from mdattn_mpi.errors import RejectedError

PROGRAM = ("-m", "mdattn_mpi.dataset.scan")
PAGE_BYTES = 4096
MAX_CRASHES = 8  # of one scan; each is an object that is left out
LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_", "HYDRA_", "SLURM_", "PALS_")
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

DAMAGED = "the file is damaged: copy it again, or make a new one"


class CrashError(Exception):
    """The child has died: how, and at which object of the file."""

    def __init__(self, how: str, path: str) -> None:
        super().__init__(how)
        self.how = how
        self.path = path


class _Child:
    """The process, and a page on which it notes what it looks at."""

    def __init__(self, allow: Sequence[str]) -> None:
        import subprocess

        self.allow = tuple(allow)
        self.owner, self.folder = os.getpid(), _folder()
        page, self._errors = os.memfd_create("mdattn-page"), os.memfd_create("mdattn-errors")
        try:
            os.ftruncate(page, PAGE_BYTES)
            self._page = mmap.mmap(page, PAGE_BYTES)
            self._process = subprocess.Popen(
                [sys.executable, *PROGRAM, str(page), *allow],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=[page],
                env=_environment(plugins=bool(allow)),
                start_new_session=True,  # signals to a rank's process group don't concern it
            )
        except OSError as error:
            os.close(self._errors)
            raise RejectedError(
                f"no process can be started to look at files: {error.strerror}",
                fix="allow more processes: ulimit -u",
            ) from error
        finally:
            os.close(page)

    def ask(self, request: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """Send one request; return the answer's JSON and its bytes.

        Raises
        ------
        CrashError
            It died, now or before.

        """
        assert self._process.stdin
        assert self._process.stdout
        answers = self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        head = answers.read(16)
        sizes = [int.from_bytes(head[at : at + 8], "little") for at in (0, 8)]
        parts = [answers.read(size) for size in sizes]
        if len(head) < 16 or [len(part) for part in parts] != sizes:
            raise self._crash()
        return parts[0], parts[1]

    def _crash(self) -> CrashError:
        code = self._process.wait()
        path = os.fsdecode(self._page[:].partition(b"\0")[0])
        if code == -signal.SIGPROF:
            how = "it takes too long"
        elif code < 0:
            how = f"it crashed: {signal.Signals(-code).name}"
        elif code:
            said = os.pread(self._errors, 1 << 16, 0).decode(errors="replace").strip()
            how = f"exit code {code}: {said.splitlines()[-1] if said else ''}"
        else:
            how = ""
        return CrashError(how, path)

    def end(self) -> None:
        """Stop using it; it ends when its standard input closes."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        os.close(self._errors)
        self._page.close()
        if self.owner == os.getpid():
            self._process.wait()


_child: _Child | None = None
_lock = Lock()


def _ask(request: Mapping[str, Any], allow: Sequence[str]) -> tuple[bytes, bytes]:
    """Ask the child of this process; start one if there is none that fits."""
    global _child
    allow = [os.path.realpath(folder) for folder in allow]
    with _lock:
        for attempt in range(2):
            here = tuple(allow), os.getpid(), _folder()
            if _child and (_child.allow, _child.owner, _child.folder) != here:
                _child.end()
                _child = None
            _child = _child or _Child(allow)
            try:
                return _child.ask(request)
            except CrashError as crash:
                _child.end()
                _child = None
                if crash.how or attempt:  # else it had just gone because nobody asked
                    raise
    raise AssertionError


def _folder() -> str:
    """The folder from which relative paths lead on; empty if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _environment(plugins: bool) -> dict[str, str]:
    kept = {name: v for name, v in os.environ.items() if not name.startswith(LAUNCHERS)}
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    if not plugins:
        ours["HDF5_PLUGIN_PRELOAD"] = "::"  # HDF5 takes that for "none"
    return kept | dict.fromkeys(THREADS, "1") | ours


def scan_file(path: str, allow: Sequence[str] = (), *, select: str = "*", depth: int = 3) -> bytes:
    """Have a file looked at; return its catalog, to be opened by `File` here or on another rank.

    The parameters are those of `File`.

    Raises
    ------
    RejectedError
        No such file, not HDF5, truncated, damaged.

    """
    must_be_regular(path)
    skip: dict[str, str] = {}
    request = {"path": path, "select": select, "depth": depth, "skip": skip}
    while True:
        try:
            text, table = _ask(request, allow)
        except CrashError as crash:
            if crash.path in ("", "/", *skip) or len(skip) >= MAX_CRASHES:
                raise RejectedError(
                    f"HDF5 can't read it ({crash.how})", fix=DAMAGED, file=path
                ) from None
            skip[crash.path] = crash.how
            continue
        if text.startswith((b'{"fault"', b'{"error"')):
            _raise(json.loads(text), path)
        return len(text).to_bytes(8, "little") + text + table


def read_box(
    path: str, allow: Sequence[str], node: str, start: Sequence[int], count: Sequence[int]
) -> bytes:
    """Have HDF5 read a box of a dataset, bit by bit as it is stored.

    Raises
    ------
    RejectedError
        The file is damaged, or can't be read.

    """
    request = {"path": path, "node": node, "start": list(start), "count": list(count)}
    try:
        text, content = _ask(request, allow)
    except CrashError as crash:
        raise RejectedError(f"HDF5 can't read it ({crash.how})", fix=DAMAGED, file=path) from None
    found = json.loads(text)
    if found:
        _raise(found, path)
    return content


def _raise(found: Mapping[str, Any], path: str) -> None:
    if "fault" in found:
        what, fix, file = found["fault"]
        raise RejectedError(what, fix=fix, file=file or path)
    raise RejectedError(f"HDF5 can't read it ({found['error']})", fix=DAMAGED, file=path)
