"""One rank's record: as it lies in memory and in the board's file, and decoded.

Times are seconds. ``since`` and ``deadline`` are on the host's monotonic clock; heartbeats and what
ends in ``wall`` are on the wall clock.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, fields
from typing import Any

PAGE = 4096  # bytes of a record in memory and in the file
ROUND_BITS = 32  # agreements of one round of the job; see `Board.join`
MAGIC = b"mdboard3"

RUNNING, STARTED, ENDED = range(3)  # before the world, in it, and after it was left in order


@dataclass(frozen=True)
class Record:
    """A copy of a rank's page, with texts decoded."""

    # who: processes and the namespace that numbers them; `job` tells runs apart
    job: int
    rank: int
    size: int
    local_size: int  # ranks of this node, by what the launcher calls one; 0 if nobody has said
    group: int
    pid: int
    watchdog_pid: int
    pid_namespace: int
    host: str
    device: str
    # what it is doing: agreements and phases entered so far, and the phase it is in
    agreements: int
    phases: int
    waiting: bool
    since: float
    deadline: float
    phase: str
    item: str
    # how far the job is, and was when it began
    done: int
    total: int
    first_done: int
    first_wall: float
    # how it ends
    state: int
    stop: bool
    exit_code: int
    fault_time: float
    late: bool
    fault: str
    # what the watchdog adds; `clock` is the wall clock less the monotonic one
    beats: int
    heartbeat: float
    process_state: str
    clock: float
    folder: str

    @staticmethod
    def decode(raw: bytes) -> Record | None:
        """Read a page; None if it isn't a record."""
        if len(raw) < ctypes.sizeof(Page) or not raw.startswith(MAGIC):
            return None
        page = Page.from_buffer_copy(raw)
        values = {field.name: getattr(page, field.name) for field in fields(Record)}
        for name, value in values.items():
            if isinstance(value, bytes):
                values[name] = value.decode(errors="replace")
        return Record(**{**values, "folder": os.fsdecode(page.folder)})

    @property
    def since_wall(self) -> float:
        """When the phase began, on the wall clock."""
        return self.since + self.clock

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank has come in the steps that all ranks of its group take alike."""
        return self.agreements, self.phases

    @property
    def stopped(self) -> bool:
        """The kernel says that the process is stopped."""
        return self.process_state == "T"

    def shares_pids_with(self, other: Record) -> bool:
        """Whether a pid of one means the same process to the other: same host, same container."""
        return (self.host, self.pid_namespace) == (other.host, other.pid_namespace)

    def is_behind(self, other: Record) -> bool:
        """Whether `other` may have to wait for this rank.

        Groups take different items and count apart; but all groups of a round of the job end
        before any of the next begins.
        """
        earlier = self.agreements >> ROUND_BITS < other.agreements >> ROUND_BITS
        return earlier or (self.group == other.group and self.progress < other.progress)


_TYPES = {"int": ctypes.c_int64, "float": ctypes.c_double, "bool": ctypes.c_bool}
_TEXTS = {"host": 128, "device": 128, "phase": 64, "item": 512, "fault": 1536, "folder": 1024}
_FIELDS: list[Any] = [
    (field.name, _TYPES.get(str(field.type)) or ctypes.c_char * _TEXTS.get(field.name, 1))
    for field in fields(Record)
]


class Page(ctypes.Structure):
    """What a rank and its watchdog store, in memory that both share: the fields of `Record`."""

    _fields_ = (("magic", ctypes.c_char * len(MAGIC)), *_FIELDS)

    def put(self, **texts: str) -> None:
        """Store texts; what is too long is cut. A path keeps its bytes, whatever they are."""
        for name, text in texts.items():
            raw = os.fsencode(text) if name == "folder" else text.encode(errors="backslashreplace")
            setattr(self, name, raw[: getattr(Page, name).size])


assert ctypes.sizeof(Page) <= PAGE
