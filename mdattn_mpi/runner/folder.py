"""The run folder, ``OUT.h5.run/``: its lock, its logs, and the summary of how the job went.

The watchdogs' board and the death note lie there too; these belong to lockstep.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mdattn_mpi.backends import Executor
from mdattn_mpi.errors import LOGGER, InternalError, MdattnError, OutputError, RejectedError
from mdattn_mpi.files import write_whole
from mdattn_mpi.lockstep import World, death_note, launcher, together
from mdattn_mpi.runner.job import Job
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.text import counted, duration, quantity

LOCK = "lock"
LOCK_PATIENCE = 5.0  # seconds: the job before this one may still be dying

LINES_BEFORE = 200  # of what a rank kept to itself before it had something to say
LOG_LINE = "%(asctime)s %(levelname)-7s %(message)s"

PACKAGES = ("mdattn_mpi", "numpy", "h5py", "mpi4py", "ml_dtypes")

# Where a rank's time goes: waiting for files and for the other ranks, transferring, computing.
TIMES = ("read", "wait", "exchange", "compute", "merge", "write")


def run_folder(spec: JobSpec) -> Path:
    """Logs, summary and death note live beside the output."""
    return Path(f"{spec.output}.run")


class RankLog(logging.FileHandler):
    """A rank's log: a file from the first warning or error on, with the lines that came before it.

    A thousand ranks that do the same, and well, make no thousand files. The one that tells what is
    done keeps its file from the start: see `tell_all`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="surrogateescape", delay=True)
        self._before: deque[logging.LogRecord] = deque(maxlen=LINES_BEFORE)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or keep it until there is a file."""
        self._before.append(record)
        if self.stream is not None or record.levelno >= logging.WARNING:
            with suppress(OSError):  # what is to be said is said on the terminal too
                self.tell_all()

    def tell_all(self) -> None:
        """Write what was kept, and from now on every line at once."""
        if self.stream is None:
            self.stream = self._open()
        while self._before:
            super().emit(self._before.popleft())


def tell_all() -> None:
    """Have this rank's log written from now on, whatever there is to say.

    Raises
    ------
    OSError
        The file can't be made.

    """
    for handler in LOGGER.handlers:
        if isinstance(handler, RankLog):
            handler.tell_all()


@contextmanager
def watched_folder(spec: JobSpec, world: World) -> Iterator[None]:
    """Collective. Make the run folder before anything slow begins: engines take minutes to build.

    No other job gets it meanwhile: two jobs that write one output would spoil it.
    A job that is refused before it has an output leaves no folder behind. Without a place for it
    (or for a dry run) there is none; what comes later says what is wrong with the place.
    """
    folder = run_folder(spec)
    made, lock = False, None

    def make() -> None:
        nonlocal made, lock
        with suppress(OSError):
            folder.mkdir()
            made = True
        if folder.is_dir():
            lock = _lock(folder)

    if not spec.dry_run:
        together(world, "run folder", lambda: make() if world.rank == 0 else None)
        if folder.is_dir():
            with suppress(OSError):
                use_folder(spec, world)
    try:
        yield
    except MdattnError as error:
        if error.agreed and not isinstance(error, InternalError):  # its traceback lies there
            _remove_empty_run(spec, world, made)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Keep other jobs out as long as the returned file is open; None where files can't be locked.

    The kernel gives the lock back when the process dies, however it does. See flock(2).
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None  # what comes later says what is wrong with the place
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(lock)
                return None  # such as Lustre that is mounted without -o flock
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            holder = os.pread(lock, 4096, 0).decode(errors="replace") or "somebody"
            os.close(lock)
            raise RejectedError(
                f"another job is writing this output: {holder}",
                file=str(folder / LOCK),
                fix="wait for it or stop it (`mdattn status` shows it), or name another output",
            ) from None
        with suppress(OSError):  # the disk is full: nobody will know who holds it
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {os.getpid()} on {os.uname().nodename}".encode(), 0)
        return lock


def _remove_empty_run(spec: JobSpec, world: World, made: bool) -> None:
    """Collective. Remove a folder that was made for nothing."""
    refused = not Path(spec.output).exists()
    if refused:
        world.board.detach()
        _close_log()
    world.barrier()
    if made and refused:
        import shutil

        shutil.rmtree(run_folder(spec), ignore_errors=True)


def use_folder(spec: JobSpec, world: World) -> None:
    """Have the watchdog publish in the run folder, and what the package logs go to a file there.

    With ``--verbose`` what rank 0 logs goes to the terminal too.

    Raises
    ------
    OSError
        The folder or the file can't be made.

    """
    folder = run_folder(spec)
    folder.mkdir(exist_ok=True)
    world.board.attach(folder, world.rank, world.size)
    path = folder.resolve() / f"rank-{world.rank:04}.log"
    if any(getattr(old, "baseFilename", "") == str(path) for old in LOGGER.handlers):
        return
    handler = RankLog(path)
    handler.setFormatter(logging.Formatter(LOG_LINE))
    _close_log()
    LOGGER.addHandler(handler)
    if spec.verbose and world.rank == 0:
        LOGGER.addHandler(terminal := logging.StreamHandler())
        terminal.setFormatter(logging.Formatter("mdattn: %(message)s"))
        terminal.addFilter(
            lambda record: record.levelno < logging.ERROR
        )  # errors are printed anyway
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # the terminal belongs to rank 0's progress
    command = shlex.join(sys.argv)
    LOGGER.info("rank %d of %d on %s: %s", world.rank, world.size, world.hostname, command)
    if world.rank == 0:
        tell_all()


def _close_log() -> None:
    for old in LOGGER.handlers[:]:
        LOGGER.removeHandler(old)
        old.close()


def provenance(executor: Executor) -> dict[str, str]:
    """Versions, device and command; never the environment."""
    return {
        "command": shlex.join(sys.argv),
        "backend": executor.name,
        "device": ", ".join(f"{name} {value}" for name, value in executor.describe().items()),
        "versions": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{package} {package_version(package)}" for package in PACKAGES]
        ),
    }


def package_version(package: str) -> str:
    """Version of an installed package, or that it isn't."""
    found: str | None = getattr(sys.modules.get(package), "__version__", None)
    if found:
        return found
    from importlib.metadata import PackageNotFoundError, version  # it imports a mail parser

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def rank_times(phases: Mapping[str, float], timings: Mapping[str, float]) -> dict[str, float]:
    """Fold one rank's clocks into the six lines of the table, in seconds."""
    enqueue = phases.get("begin", 0.0) + phases.get("enqueue", 0.0)
    inside = sum(timings.get(name, 0.0) for name in ("exchange", "merge"))
    return {
        "read": phases.get("read", 0.0),
        "wait": phases.get("agree", 0.0),
        "exchange": timings.get("exchange", 0.0),
        "compute": timings.get("compute", max(0.0, enqueue - inside)),
        "merge": timings.get("merge", 0.0),
        "write": phases.get("write", 0.0),
    }


def time_table(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Min, mean and max over ranks of every phase, and the slowest rank by name.

    `ranks` holds for each rank ``host`` and ``seconds`` (of `rank_times`).
    """
    lines = [f"{'phase':<10}{'min':>10}{'mean':>10}{'max':>10}   slowest"]
    for phase in TIMES:
        seconds = [rank["seconds"][phase] for rank in ranks]
        slowest = max(range(len(ranks)), key=seconds.__getitem__)
        mean = sum(seconds) / len(seconds)
        lines.append(
            f"{phase:<10}{duration(min(seconds)):>10}{duration(mean):>10}"
            f"{duration(max(seconds)):>10}   rank {slowest} on {ranks[slowest]['host']}"
        )
    return "\n".join(lines)


def summarize(
    job: Job,
    ranks: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, str]],
    code: int,
) -> dict[str, Any]:
    """Everything worth keeping of a job that came to its end; `ranks` as in `time_table`."""
    elapsed = job.seconds["items"]
    assert job.output is not None
    left = set(job.output.left(job.todo))
    finished = [item for number, item in enumerate(job.todo) if number not in left]
    return {
        "exit_code": code,
        "config": asdict(job.spec),
        **provenance(job.executor),
        "launcher": str(launcher()),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": job.seconds,
        "items": {
            "all": len(job.items),
            "done_before": len(job.items) - len(job.todo),
            "done_now": len(finished),
            "failed": list(failed),
        },
        "tokens_per_second": sum(item.problem.tokens for item in finished) / elapsed,
        "flops_per_second": sum(item.problem.flops for item in finished) / elapsed,
        "groups": list(job.schedule.reasons),
        "strategies": sorted({plan.strategy for plan in job.plans.values()}),
        "ranks": list(ranks),
    }


def closing_words(summary: Mapping[str, Any], path: Path) -> str:
    """What the person reads last: the table, what is done, what isn't, and what to do about it."""
    items, code = summary["items"], summary["exit_code"]
    done = items["done_before"] + items["done_now"]
    lines = [time_table(summary["ranks"])] if items["done_now"] else []
    now = "none of them now"
    if items["done_now"]:
        seconds = duration(summary["seconds"]["items"])
        now = f"{items['done_now']} of them now, in {seconds}; {_rate(summary)}"
    lines.append(f"mdattn: {done} of {counted(items['all'], 'item')} done, {now}")
    if items["failed"]:
        lines.append("mdattn: failed: " + ", ".join(each["item"] for each in items["failed"]))
    if code == 75:
        lines.append(f"mdattn: stopped as asked; to go on, {death_note.again()}")
    output = shlex.quote(summary["config"]["output"])
    lines.append(f"mdattn: summary in {path}; for a page: mdattn report {output}")
    return "\n".join(lines)


def nothing_left(spec: JobSpec, before: Mapping[str, Any]) -> dict[str, Any]:
    """Make the summary of a job that finds everything done, from that of the job that did it."""
    nothing = {"seconds": dict.fromkeys(TIMES, 0.0), "background": {}}
    done = before["items"]["all"]
    return {
        **before,
        "config": asdict(spec),
        "command": shlex.join(sys.argv),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": dict.fromkeys(before["seconds"], 0.0),
        "items": {"all": done, "done_before": done, "done_now": 0, "failed": []},
        "tokens_per_second": 0.0,
        "flops_per_second": 0.0,
        "ranks": [{**rank, **nothing} for rank in before["ranks"]],
    }


def _rate(summary: Mapping[str, Any]) -> str:
    """How fast it was: in operations, where they are known."""
    if summary["flops_per_second"]:
        return quantity(summary["flops_per_second"], "FLOP/s")
    return quantity(summary["tokens_per_second"], "tokens/s")


def write_summary(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Replace ``summary.json`` in the run folder; never leaves half a file.

    Raises
    ------
    OutputError
        It can't be written.

    """
    path = folder / "summary.json"
    try:
        write_whole(path, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise OutputError(
            f"the summary can't be written: {error.strerror}",
            file=str(path),
            fix="make room there; the finished items are intact",
        ) from error
    return path
