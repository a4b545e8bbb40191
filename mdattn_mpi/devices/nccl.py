"""An NCCL communicator of a group, its unique id shared over MPI.

Where ranks can't write into each other's memory (across nodes) their messages go this way, and
TensorRT's collectives use it too. All of a process must use one and the same libnccl: two of them
know nothing of each other's kernels, and wait for each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdattn_mpi.devices.presence import EXTRA
from mdattn_mpi.errors import DeviceError, RejectedError

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import Group

PATIENCE = 600.0  # seconds for ranks to find each other; the watchdog is sooner
_PAUSE = 50e-6


class NcclComm:
    """Collective. The ranks of a group as NCCL knows them, on the current GPU.

    Parameters
    ----------
    group
        The ranks.
    blocking
        Calls return when they are done; for those who can't ask whether they are.

    Attributes
    ----------
    ptr
        The ``ncclComm_t``.
    library
        Version and path of the one libnccl.

    Raises
    ------
    RejectedError
        nccl4py isn't installed.
    DeviceError
        NCCL can't be loaded, is there twice, or fails.

    """

    def __init__(self, group: Group, *, blocking: bool = False) -> None:
        from mdattn_mpi.lockstep import together

        # What some ranks may fail at stands before what all must take part in, and apart from it.
        self._nccl = nccl = together(group, "nccl4py", _load)
        first = group.rank == 0
        unique = together(group, "NCCL", lambda: nccl.get_unique_id().as_bytes if first else None)
        unique_id = nccl.UniqueId.from_bytes(group.bcast_bytes(unique))
        config = nccl.NCCLConfig(blocking=blocking)

        def init() -> str:
            self._comm = nccl.Communicator.init(group.size, group.rank, unique_id, config=config)
            self._settle("init")
            return describe_library(nccl)

        self.library = together(group, "NCCL init", init)

    @property
    def ptr(self) -> int:
        """The ``ncclComm_t``."""
        return int(self._comm.ptr)

    def exchange(
        self,
        send: Mapping[int, Sequence[tuple[int, int]]],
        receive: Mapping[int, Sequence[tuple[int, int]]],
        stream: int,
    ) -> None:
        """Collective. Send and receive ``(address, bytes)`` by peer, in order, on a stream."""
        # Not through `Communicator.send`, which imports PyTorch to look at what it is given.
        raw, byte = self._raw, int(self._nccl.INT8)
        comm = raw.Comm(self.ptr)
        raw.group_start()
        for peer, messages in send.items():
            for address, nbytes in messages:
                raw.send(address, nbytes, byte, peer, comm, stream)
        for peer, messages in receive.items():
            for address, nbytes in messages:
                raw.recv(address, nbytes, byte, peer, comm, stream)
        raw.group_end()
        self._settle("exchange")

    def all_reduce(self, source: int, target: int, count: int, stream: int) -> None:
        """Collective. Sum `count` values of ``int64`` over all ranks, on a stream."""
        int64, total = int(self._nccl.INT64), int(self._nccl.SUM)
        comm = self._raw.Comm(self.ptr)
        self._raw.all_reduce(source, target, count, int64, total, comm, stream)
        self._settle("all-reduce")

    def check(self) -> None:
        """Raise what has gone wrong since."""
        state = self._comm.get_async_error()
        if state not in (self._result.Success, self._result.InProgress):
            raise self._error("a transfer", state)

    def close(self) -> None:
        """Collective. Finish what is under way, then destroy."""
        self._comm.finalize()
        self._settle("finalize")
        self._comm.destroy()

    def abort(self) -> None:
        """Release what can be released at once, waiting for no other rank."""
        self._comm.abort()

    @property
    def _raw(self) -> Any:
        from nccl.bindings import nccl as raw

        return raw

    @property
    def _result(self) -> Any:
        return self._raw.Result

    def _settle(self, what: str) -> None:
        """Poll until a call that returned early has come to its end."""
        deadline = time.monotonic() + PATIENCE
        while (state := self._comm.get_async_error()) == self._result.InProgress:
            if time.monotonic() > deadline:
                self.abort()
                raise DeviceError(f"NCCL: {what} took longer than {PATIENCE:.0f} s")
            time.sleep(_PAUSE)
        if state != self._result.Success:
            error = self._error(what, state)
            self.abort()
            raise error

    def _error(self, what: str, state: Any) -> DeviceError:
        return DeviceError(
            f"NCCL: {what}: {self._nccl.get_error_string(state)}; {self._comm.get_last_error()}",
            fix="set NCCL_DEBUG=WARN to see more",
        )


def describe_library(nccl: Any) -> str:
    """Version and path of the one libnccl of this process.

    Raises
    ------
    DeviceError
        There are two.

    """
    paths = loaded_nccl()
    if len(paths) > 1:
        raise DeviceError(
            f"this process has loaded NCCL twice: {' and '.join(paths)}",
            fix="put the folder of one of them first in LD_LIBRARY_PATH, or uninstall the other",
        )
    version = nccl.get_version().libnccl
    return f"{version.version if version else 'unknown'} ({paths[0] if paths else 'not loaded'})"


def loaded_nccl(maps: Path = Path("/proc/self/maps")) -> tuple[str, ...]:
    """List the files of libnccl that this process has mapped; `maps` as Linux writes it."""
    found: dict[str, None] = {}
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and Path(fields[5].strip()).name.startswith("libnccl.so"):
            found[str(Path(fields[5].strip()).resolve())] = None
    return tuple(found)


def nccl_libraries(environment: Mapping[str, str]) -> list[str]:
    """Every libnccl that the loader or Python could find here, first come first."""
    folders = [Path(part) for part in environment.get("LD_LIBRARY_PATH", "").split(":") if part]
    for root in sys.path:
        folders += sorted(Path(root).glob("nvidia/nccl*/lib")) if root else []
    folders += [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/local/lib")]
    found: dict[str, None] = {}
    for folder in folders:
        for name in ("libnccl.so.2", "libnccl.so"):
            if (folder / name).exists():
                found[str((folder / name).resolve())] = None
    return list(found)


def _load() -> Any:
    try:
        import nccl.core as nccl
    except ImportError as missing:
        raise RejectedError(f"nccl4py can't be imported ({missing})", fix=EXTRA) from None
    try:
        nccl.get_version()
    except Exception as error:
        raise DeviceError(
            f"NCCL can't be loaded ({error})", fix=f"{EXTRA}, or add libnccl.so.2 to the path"
        ) from error
    return nccl
