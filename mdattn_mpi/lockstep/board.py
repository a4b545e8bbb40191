"""Where a rank says what it is doing, so that others can read it when it can't speak any more.

The rank stores into one page of memory that it shares with its watchdog (about a microsecond, no
system call). The watchdog adds what it sees and copies the page into a file in the run folder, one
page a rank, where other watchdogs and ``mdattn status`` read it. Page 0 of that file is the
bulletin: it is empty until a rank is lost.

==========  ======================================================================================
page part   contents
==========  ======================================================================================
identity    who: rank, size, group, processes and the namespace that numbers them, host, device;
            and the job's number, by which records of an earlier run are told apart
moment      what: agreements entered, phases entered, since when, until when, phase, item
progress    how far the job is: items done, items in all; and how far it was when it began, and when
state       started, ended, exit code; whether a stop was asked for
watch       the watchdog's own part: a heartbeat, the state that the kernel gives the process, and
            how far the calendar's clock is ahead of the other one
fault       what went wrong, in words
folder      the run folder: tells the watchdog where the board's file is
==========  ======================================================================================
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from mdattn_mpi.lockstep.death_note import put_aside

PAGE = 4096
EPOCH_BITS = 32  # agreements of one phase of the job's schedule; see `Board.join`
MAGIC = b"mdboard1"
BULLETIN_MAGIC = b"mdlost01"
FILE = "board"

_IDENTITY = Struct("<8sQiiiIIQ128s128s")
_MOMENT = Struct("<QQQQQ64s")
_ITEM = Struct("<512s")
_DEADLINE = Struct("<Q")
_COUNT = Struct("<QQQ")
_PROGRESS = Struct("<QQQQ")
_STATE = Struct("<BBxxi")  # of the three, the watchdog sets the second
_WATCH = Struct("<QQcxxxxxxxq")
_FAULT = Struct("<Q?1527s")
_BULLETIN = Struct("<8sQi")
_FOLDER = Struct("<1024s")

_AT_IDENTITY = 0
_AT_MOMENT = 320
_AT_WAITING = _AT_MOMENT + 16
_AT_DEADLINE = _AT_MOMENT + 32
_AT_ITEM = _AT_MOMENT + _MOMENT.size
_AT_PROGRESS = 960
_AT_STATE = 992
_AT_STOP = _AT_STATE + 1
_AT_WATCH = 1024
_AT_FAULT = 1088
_AT_FOLDER = 3072

RUNNING, STARTED, ENDED = range(3)  # before the world, in it, and after it was left in order


@dataclass(frozen=True)
class Record:
    """One rank's page, decoded. Times are seconds; ``deadline`` and ``since`` by the host's clock
    that only goes forward, ``since_wall`` and ``heartbeat`` by the calendar's.
    """

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
    since_wall: float
    deadline: float
    phase: str
    item: str
    done: int
    total: int
    first_done: int
    first_wall: float
    state: int
    stop: bool
    exit_code: int
    beats: int
    heartbeat: float
    process_state: str
    fault_time: float
    late: bool
    fault: str
    folder: str

    def shares_pids_with(self, other: Record) -> bool:
        """Whether a pid of one means the same process to the other: same host, same container."""
        return (self.host, self.pid_namespace) == (other.host, other.pid_namespace)

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank has come in the steps that all ranks of its group take alike."""
        return self.agreements, self.phases

    @property
    def stopped(self) -> bool:
        """The kernel says that the process is stopped."""
        return self.process_state == "T"

    def is_behind(self, other: Record) -> bool:
        """Whether `other` may have to wait for this rank.

        Groups take different items and count apart; but all that `Board.join` later phases of the
        job come after all that are in earlier ones.
        """
        earlier = self.agreements >> EPOCH_BITS < other.agreements >> EPOCH_BITS
        return earlier or (self.group == other.group and self.progress < other.progress)

    @staticmethod
    def decode(page: bytes) -> Record | None:
        """Read a page; None if it is no record."""
        if len(page) < PAGE or not page.startswith(MAGIC):
            return None
        _, job, rank, size, group, pid, watchdog_pid, pid_namespace, host, device = (
            _IDENTITY.unpack_from(page)
        )
        agreements, phases, waiting, since, deadline, phase = _MOMENT.unpack_from(page, _AT_MOMENT)
        (item,) = _ITEM.unpack_from(page, _AT_ITEM)
        done, total, first_done, first_wall = _PROGRESS.unpack_from(page, _AT_PROGRESS)
        state, stop, exit_code = _STATE.unpack_from(page, _AT_STATE)
        beats, heartbeat, process_state, clock = _WATCH.unpack_from(page, _AT_WATCH)
        fault_time, late, fault = _FAULT.unpack_from(page, _AT_FAULT)
        (folder,) = _FOLDER.unpack_from(page, _AT_FOLDER)
        return Record(
            job, rank, size, group, pid, watchdog_pid, pid_namespace, _text(host), _text(device),
            agreements, phases, bool(waiting), since / 1e9, (since + clock) / 1e9, deadline / 1e9,
            _text(phase), _text(item), done, total, first_done, first_wall / 1e9,
            state, bool(stop), exit_code,
            beats, heartbeat / 1e9, _text(process_state), fault_time / 1e9, late, _text(fault),
            os.fsdecode(folder.rstrip(b"\0")),
        )  # fmt: skip


class Board:
    """This process's page. Without a watchdog it is private memory, and everything still works."""

    def __init__(self, page: memoryview | None = None) -> None:
        self.page = memoryview(bytearray(PAGE)) if page is None else page
        self.patience = 1800.0  # seconds that a phase may last which names no deadline of its own
        self.on_enter: Callable[[str, str], None] | None = None  # faults on purpose
        self._agreements = 0
        self._phases = 0
        self._item = ""
        self._first: tuple[int, int] | None = None
        self._identity: dict[str, int | str] = {
            "job": 0, "rank": -1, "size": 0, "group": 0, "device": "",
        }  # fmt: skip
        self._host = os.uname().nodename
        self._pid_namespace = pid_namespace()
        self.identify()
        self.beat("R")

    # -- the rank says -----------------------------------------------------------------------------

    def enter(self, phase: str, item: str = "", deadline: float | None = None) -> int:
        """Say that `phase` begins now and lasts `deadline` seconds at most.

        Return the time, in nanoseconds of the host's clock that only goes forward.
        """
        return self.tell(phase.encode(), item, int(1e9 * (deadline or self.patience)))

    def tell(self, phase: bytes, item: str, limit: int) -> int:
        """Do as `enter`, with what is the same every time already made; `limit` in nanoseconds."""
        now = time.monotonic_ns()
        self._phases += 1
        if item is not self._item:
            _ITEM.pack_into(self.page, _AT_ITEM, item.encode())
            self._item = item
        _MOMENT.pack_into(
            self.page, _AT_MOMENT, self._agreements, self._phases, 0, now, now + limit, phase
        )
        if self.on_enter:
            self.on_enter(phase.decode(), item)
        return now

    def wait(self) -> None:
        """Say that this rank now waits for the others, having entered one more agreement."""
        self._agreements += 1
        self._phases += 1
        _COUNT.pack_into(self.page, _AT_MOMENT, self._agreements, self._phases, 1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that this rank waits for others as long as the block lasts."""
        self.page[_AT_WAITING] = 1
        yield
        self.page[_AT_WAITING] = 0

    def join(self, group: int, counted: int) -> None:
        """Say that this rank works in another group now, whose ranks all count from `counted`.

        That is a multiple of ``1 << EPOCH_BITS``, and a larger one for each phase of the job.
        """
        self._agreements = self._phases = counted
        self.identify(group=group)

    def identify(self, **known: int | str) -> None:
        """Say who this is: any of job, rank, size, group, device."""
        self._identity.update(known)
        who = self._identity
        _IDENTITY.pack_into(
            self.page, _AT_IDENTITY, MAGIC, who["job"], who["rank"], who["size"], who["group"],
            os.getpid(), self.watchdog_pid, self._pid_namespace,
            self._host.encode(), str(who["device"]).encode(),
        )  # fmt: skip

    def attach(self, run_folder: str | Path, rank: int, size: int, device: str = "") -> None:
        """Let the watchdog publish this page, and write its death note, in `run_folder`."""
        self.identify(rank=rank, size=size, device=device)
        if rank == 0:
            put_aside(run_folder, int(self._identity["job"]))
        _FOLDER.pack_into(self.page, _AT_FOLDER, os.fsencode(Path(run_folder).resolve()))

    def detach(self) -> None:
        """Let the watchdog leave the run folder alone from now on."""
        _FOLDER.pack_into(self.page, _AT_FOLDER, b"")

    def progress(self, done: int, total: int) -> None:
        """Say how many items are finished, of how many; the first call says where it began."""
        self._first = self._first or (done, time.time_ns())
        _PROGRESS.pack_into(self.page, _AT_PROGRESS, done, total, *self._first)

    def fail(self, what: str, *, late: bool = False) -> None:
        """Say that this rank alone has failed, and how; what is said first stays."""
        if not _FAULT.unpack_from(self.page, _AT_FAULT)[0]:
            said = what.encode(errors="backslashreplace")
            _FAULT.pack_into(self.page, _AT_FAULT, time.time_ns(), late, said)

    def suspect(self, what: str, code: int) -> None:
        """Say ahead what it was, and the exit code, if MPI ends this process while it starts."""
        self.fail(what)
        self.exit(code)

    def started(self) -> None:
        """Say that this rank belongs to a world now: from here on others wait for it."""
        self.page[_AT_STATE] = STARTED
        _FAULT.pack_into(self.page, _AT_FAULT, 0, False, b"")  # what was suspected wasn't so

    def end(self) -> None:
        """Say that this rank left the world in order; whatever its exit code, it is no death."""
        self.page[_AT_STATE] = ENDED

    def exit(self, code: int) -> None:
        """Say with which code the process is about to exit."""
        _STATE.pack_into(self.page, _AT_STATE, self.page[_AT_STATE], self.page[_AT_STOP], code)

    # -- the rank asks -----------------------------------------------------------------------------

    @property
    def stop_requested(self) -> bool:
        """A signal asked this rank to stop after the current item."""
        return self.page[_AT_STOP] != 0

    def request_stop(self) -> None:
        """Ask this rank to stop after the current item."""
        self.page[_AT_STOP] = 1

    # -- the watchdog says -------------------------------------------------------------------------

    watchdog_pid = 0  # none

    def beat(self, process_state: str) -> None:
        """Say that the watchdog lives, and how the kernel calls the state of the rank."""
        beats = _WATCH.unpack_from(self.page, _AT_WATCH)[0]
        now = time.time_ns()
        _WATCH.pack_into(
            self.page, _AT_WATCH, beats + 1, now, (process_state or "X").encode(),
            now - time.monotonic_ns(),
        )  # fmt: skip

    @property
    def deadline(self) -> float:
        """When the rank must have left its phase; 0 before the first one."""
        nanoseconds: int = _DEADLINE.unpack_from(self.page, _AT_DEADLINE)[0]
        return nanoseconds / 1e9

    def record(self) -> Record:
        """Decode this page."""
        record = Record.decode(bytes(self.page))
        assert record is not None
        return record


_board: Board | None = None


def board() -> Board:
    """Return the board of this process; made on first use, unless a watchdog shares it."""
    return _board or share(Board())


def share(new: Board) -> Board:
    """Make `new` the board of this process."""
    global _board
    _board = new
    return new


@dataclass(frozen=True)
class BoardFile:
    """All ranks' pages in the run folder, and the bulletin.

    The file is opened anew every time: that is what makes NFS show what other hosts wrote.
    """

    folder: str | Path

    def publish(self, page: bytes, rank: int, size: int) -> None:
        """Write the page of `rank`."""
        with self._open() as file:
            if os.fstat(file).st_size < PAGE * (1 + size):
                os.posix_fallocate(
                    file, 0, PAGE * (1 + size)
                )  # so that a full disk can't refuse later
            os.pwrite(file, page, PAGE * (1 + rank))

    def announce(self, job: int, rank: int) -> None:
        """Tell all watchdogs of `job` that `rank` (-1: nobody in particular) is lost."""
        with self._open() as file:
            os.pwrite(file, _BULLETIN.pack(BULLETIN_MAGIC, job, rank), 0)

    def lost(self, job: int) -> bool:
        """Whether a rank of `job` has been announced as lost."""
        with self._open() as file:
            raw = os.pread(file, _BULLETIN.size, 0)
        return len(raw) == _BULLETIN.size and _BULLETIN.unpack(raw)[:2] == (BULLETIN_MAGIC, job)

    def records(self, job: int | None = None) -> list[Record]:
        """Read the records of `job`, or of the latest run, in rank order; [] if there are none."""
        try:
            pages = (Path(self.folder) / FILE).read_bytes()
        except OSError:
            return []
        found = [Record.decode(pages[at : at + PAGE]) for at in range(PAGE, len(pages), PAGE)]
        records = [record for record in found if record is not None]
        if job is None:
            job = max(records, key=lambda record: record.heartbeat).job if records else 0
        return [record for record in records if record.job == job]

    @contextmanager
    def _open(self) -> Iterator[int]:
        file = os.open(Path(self.folder) / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield file
        finally:
            os.close(file)


def pid_namespace() -> int:
    """Return the number of the namespace in which this process's pid counts; 0 if it has none.

    Source: pid_namespaces(7).
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
