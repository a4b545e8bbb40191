"""One rank's record: as it lies in memory and in the board's file, and decoded.

Times are seconds. ``since`` and ``deadline`` are by the host's clock that only goes forward; those
that end in ``wall`` or are a heartbeat are by the calendar's.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, fields

PAGE = 4096  # bytes of a record in memory and in the file
EPOCH_BITS = 32  # agreements of one phase of the job's schedule; see `Board.join`
MAGIC = b"mdboard2"

RUNNING, STARTED, ENDED = range(3)  # before the world, in it, and after it was left in order


class Page(ctypes.Structure):
    """What a rank and its watchdog store, in memory that both share."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        # who: processes and the namespace that numbers them; `job` tells runs apart
        ("job", ctypes.c_uint64),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("pid", ctypes.c_int32),
        ("watchdog_pid", ctypes.c_int32),
        ("pid_namespace", ctypes.c_uint64),
        ("host", ctypes.c_char * 128),
        ("device", ctypes.c_char * 128),
        # what it is doing: agreements and phases entered so far, and the phase it is in
        ("agreements", ctypes.c_uint64),
        ("phases", ctypes.c_uint64),
        ("waiting", ctypes.c_bool),
        ("since", ctypes.c_double),
        ("deadline", ctypes.c_double),
        ("phase", ctypes.c_char * 64),
        ("item", ctypes.c_char * 512),
        # how far the job is, and was when it began
        ("done", ctypes.c_uint64),
        ("total", ctypes.c_uint64),
        ("first_done", ctypes.c_uint64),
        ("first_wall", ctypes.c_double),
        # how it ends
        ("state", ctypes.c_uint8),
        ("stop", ctypes.c_bool),
        ("exit_code", ctypes.c_int32),
        ("fault_time", ctypes.c_double),
        ("late", ctypes.c_bool),
        ("fault", ctypes.c_char * 1536),
        # what the watchdog adds; `clock` is how far the calendar is ahead of the other clock
        ("beats", ctypes.c_uint64),
        ("heartbeat", ctypes.c_double),
        ("process_state", ctypes.c_char * 1),
        ("clock", ctypes.c_double),
        ("folder", ctypes.c_char * 1024),
    )

    def put(self, **values: str) -> None:
        """Store texts; what is too long is cut."""
        for name, value in values.items():
            setattr(self, name, os.fsencode(value)[: getattr(Page, name).size])


assert ctypes.sizeof(Page) <= PAGE


@dataclass(frozen=True)
class Record:
    """A copy of a page, with texts decoded."""

    job: int
    rank: int
    size: int
    group: int
    pid: int
    watchdog_pid: int
    pid_namespace: int
    host: str
    device: str
    agreements: int
    phases: int
    waiting: bool
    since: float
    deadline: float
    phase: str
    item: str
    done: int
    total: int
    first_done: int
    first_wall: float
    state: int
    exit_code: int
    fault_time: float
    late: bool
    fault: str
    beats: int
    heartbeat: float
    process_state: str
    clock: float
    folder: str

    @staticmethod
    def decode(raw: bytes) -> Record | None:
        """Read a page; None if it is no record."""
        if len(raw) < ctypes.sizeof(Page) or not raw.startswith(MAGIC):
            return None
        page = Page.from_buffer_copy(raw)
        values = {field.name: getattr(page, field.name) for field in fields(Record)}
        folder = os.fsdecode(values.pop("folder"))
        texts = {
            name: value.decode(errors="replace")
            for name, value in values.items()
            if isinstance(value, bytes)
        }
        return Record(**{**values, **texts}, folder=folder)

    @property
    def since_wall(self) -> float:
        """When the phase began, by the calendar."""
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

        Groups take different items and count apart; but all that `Board.join` later phases of the
        job come after all that are in earlier ones.
        """
        earlier = self.agreements >> EPOCH_BITS < other.agreements >> EPOCH_BITS
        return earlier or (self.group == other.group and self.progress < other.progress)
