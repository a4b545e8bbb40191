"""Where a rank says what it is doing, so that others can read it when it can't speak any more.

The rank stores into one page of memory that it shares with its watchdog (about a microsecond, no
system call). The watchdog adds what it sees and copies the page to where the watchdogs of its node
meet (`node`). One of them publishes the pages of the node in a file in the run folder, one page a
rank, where other nodes and ``mdattn status`` read them. Page 0 of that file is for all nodes: it
says when a rank is lost, and when somebody needs to know where everybody is.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mdattn_mpi.lockstep.death_note import put_aside
from mdattn_mpi.lockstep.record import ENDED, MAGIC, PAGE, STARTED, Page, Record

FILE = "board"
LOST_MAGIC = b"mdlost02"
MOST_AT_ONCE = 512  # buffers of one call: Linux takes 1024


class Board:
    """This process's page. Without a watchdog it is private memory, and everything still works.

    Parameters
    ----------
    memory
        `PAGE` bytes, if another process shares them.

    """

    def __init__(self, memory: Any = None) -> None:
        self.page = Page.from_buffer(bytearray(PAGE) if memory is None else memory)
        self.patience = 1800.0  # seconds that a phase may last which names no deadline of its own
        self.on_enter: Callable[[str, str], None] | None = None  # faults on purpose
        self._item = ""
        self.page.magic = MAGIC
        self.identify(rank=-1)
        self.beat("R")

    # -- the rank says -----------------------------------------------------------------------------

    def enter(self, phase: str, item: str = "", deadline: float | None = None) -> int:
        """Say that `phase` begins now and lasts `deadline` seconds at most.

        Return the time, in nanoseconds of the monotonic clock.
        """
        now = time.monotonic_ns()
        since, page = 1e-9 * now, self.page
        page.deadline = since + (deadline or self.patience)  # first: a watchdog may look meanwhile
        page.since = since
        page.phases += 1
        page.waiting = False
        page.phase = phase.encode()[:64]
        if item is not self._item:
            page.put(item=item)
            self._item = item
        if self.on_enter:
            self.on_enter(phase, item)
        return now

    def wait(self) -> None:
        """Say that this rank now waits for the others, having entered one more agreement."""
        page = self.page
        page.agreements += 1
        page.phases += 1
        page.waiting = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that this rank waits for others as long as the block lasts."""
        self.page.waiting = True
        yield
        self.page.waiting = False

    def join(self, group: int, counted: int) -> None:
        """Say that this rank works in another group now, whose ranks all count from `counted`.

        That is a multiple of ``1 << ROUND_BITS``, and a larger one for each round of the job.
        """
        self.page.agreements = self.page.phases = counted
        self.identify(group=group)

    def identify(self, *, device: str | None = None, **numbers: int) -> None:
        """Say who this is: any of job, rank, size, group, watchdog_pid, device."""
        page = self.page
        page.pid, page.pid_namespace = os.getpid(), pid_namespace()
        page.put(host=os.uname().nodename)
        if device is not None:
            page.put(device=device)
        for name, number in numbers.items():
            setattr(page, name, number)

    def attach(self, run_folder: str | Path, rank: int, size: int) -> None:
        """Let the watchdog publish this page, and write its death note, in `run_folder`."""
        self.identify(rank=rank, size=size)
        if rank == 0:
            put_aside(run_folder, self.page.job)
        self.page.put(folder=str(Path(run_folder).resolve()))

    def detach(self) -> None:
        """Let the watchdog leave the run folder alone from now on."""
        self.page.put(folder="")

    def progress(self, done: int, total: int) -> None:
        """Say how many items are finished, of how many; the first call says where it began."""
        page = self.page
        if not page.first_wall:
            page.first_done, page.first_wall = done, time.time()
        page.done, page.total = done, total

    def fail(self, what: str, *, late: bool = False) -> None:
        """Say that this rank alone has failed, and how; what is said first stays."""
        if not self.page.fault_time:
            self.page.put(fault=what)
            self.page.fault_time, self.page.late = time.time(), late

    def suspect(self, what: str, code: int) -> None:
        """Store the fault and exit code to report if MPI ends this process while it starts."""
        self.fail(what)
        self.exit(code)

    def started(self) -> None:
        """Say that this rank belongs to a world now: from here on others wait for it."""
        self.page.state = STARTED
        self.page.fault_time = 0.0  # the suspicion was wrong
        self.page.put(fault="")

    def end(self) -> None:
        """Say that this rank left the world in order; whatever its exit code, it isn't lost."""
        self.page.state = ENDED

    def exit(self, code: int) -> None:
        """Say with which code the process is about to exit."""
        self.page.exit_code = code

    @property
    def watchdog_pid(self) -> int:
        """The pid of this rank's watchdog; 0 if it has none."""
        return int(self.page.watchdog_pid)

    # -- the rank asks -----------------------------------------------------------------------------

    @property
    def stop_requested(self) -> bool:
        """A signal asked this rank to stop after the current item."""
        return bool(self.page.stop)

    # -- the watchdog says -------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask this rank to stop after the current item."""
        self.page.stop = True

    def beat(self, process_state: str) -> None:
        """Say that the watchdog is alive, and in which state the kernel has the rank."""
        page, now = self.page, time.time()
        page.beats += 1
        page.heartbeat, page.clock = now, now - time.monotonic()
        page.put(process_state=process_state or "X")

    def record(self) -> Record:
        """Decode this page."""
        record = Record.decode(bytes(self.page))
        assert record is not None
        return record

    def restore(self, page: Page) -> None:
        """Undo what the rank has stored since `page` was copied."""
        ctypes.pointer(self.page)[0] = page


_board: Board | None = None


def board() -> Board:
    """Return the board of this process; made on first use, unless a watchdog shares it."""
    return _board or share(Board())


def share(new: Board) -> Board:
    """Make `new` the board of this process."""
    global _board
    _board = new
    return new


class Notice(NamedTuple):
    """What page 0 says to all nodes: a rank is lost; and how often somebody has asked for news."""

    lost: bool
    asked: int


@dataclass(frozen=True)
class BoardFile:
    """All ranks' pages in the run folder, and the notice to all nodes.

    The file is reopened every time: that is what makes NFS show what other hosts wrote.
    """

    folder: str | Path

    def publish(self, pages: Mapping[int, bytes], size: int) -> None:
        """Write the pages of some of `size` ranks; those of neighbours at once."""
        with self._open() as file:
            whole = PAGE * (1 + size)
            if os.fstat(file).st_size < whole:
                os.posix_fallocate(file, 0, whole)  # so that a full disk can't refuse later
            for first, run in _runs(pages):
                os.pwritev(file, run, PAGE * (1 + first))

    def announce_loss(self, job: int) -> None:
        """Tell all nodes of `job` that a rank is lost."""
        with self._open() as file:
            os.pwrite(file, LOST_MAGIC + job.to_bytes(8, "little"), 0)

    def ask(self) -> None:
        """Have all nodes publish when they look next."""
        with self._open() as file:
            asked = int.from_bytes(os.pread(file, 8, 16), "little")
            os.pwrite(file, ((asked + 1) % (1 << 63)).to_bytes(8, "little"), 16)

    def notice(self, job: int) -> Notice:
        """Read what concerns `job` of the notice."""
        with self._open() as file:
            return decode_notice(os.pread(file, 24, 0), job)

    def pages(self) -> list[bytes]:
        """Read all pages in rank order; [] if there are none."""
        try:
            whole = (Path(self.folder) / FILE).read_bytes()
        except OSError:
            return []
        return [whole[at : at + PAGE] for at in range(PAGE, len(whole), PAGE)]

    def records(self, job: int | None = None) -> list[Record]:
        """Decode the pages of `job`, or of the latest run, in rank order."""
        records = decode(self.pages())
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


def _runs(pages: Mapping[int, bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Pages of ranks that follow each other, with the first of these ranks."""
    run: list[bytes] = []
    for rank in sorted(pages):
        run.append(pages[rank])
        if rank + 1 not in pages or len(run) == MOST_AT_ONCE:
            yield rank + 1 - len(run), run
            run = []


def decode(pages: Iterable[bytes]) -> list[Record]:
    """Leave out what is no record."""
    found = (Record.decode(page) for page in pages)
    return [record for record in found if record is not None]


def decode_notice(raw: bytes, job: int) -> Notice:
    """Read page 0, of which 24 bytes are enough."""
    lost = raw[:16] == LOST_MAGIC + job.to_bytes(8, "little")
    return Notice(lost, int.from_bytes(raw[16:24], "little"))


def pid_namespace() -> int:
    """Return the number of the namespace in which this process's pid counts; 0 if it has none.

    Source: pid_namespaces(7).
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
