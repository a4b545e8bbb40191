"""The exception family, and the exit code that each member gives the job."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

LOGGER = logging.getLogger("mdattn_mpi")  # each rank of a job has a file of its own for it


class MdattnError(Exception):
    """An error that a user can act on: where it happened, what is wrong, what to do.

    Parameters
    ----------
    what
        What is wrong, with the offending value, as one sentence.
    fix
        What the user can do about it, as one sentence.
    file, item, rank
        Where it happened, as far as that is known.

    """

    exit_code: ClassVar[int] = 4
    agreed: bool = False  # all ranks raise this same error: they may still talk to each other

    def __init__(
        self,
        what: str,
        *,
        fix: str = "",
        file: str = "",
        item: str = "",
        rank: int | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.file = file
        self.item = item
        self.rank = rank

    def __str__(self) -> str:
        """One paragraph: ``FILE, item NAME, rank R: what. Fix: …``."""
        place = ", ".join(
            part
            for part in (
                self.file,
                f"item {self.item!r}" if self.item else "",
                f"rank {self.rank}" if self.rank is not None else "",
            )
            if part
        )
        text = f"{place}: {self.what}" if place else self.what
        return f"{text.rstrip('.')}. Fix: {self.fix}" if self.fix else text

    def to_json(self) -> bytes:
        """Encode for the way to the other ranks."""
        names = ("what", "fix", "file", "item", "rank")
        fields = {name: getattr(self, name) for name in names}
        return json.dumps({"kind": type(self).__name__, **fields}).encode()

    @staticmethod
    def from_json(data: bytes) -> MdattnError:
        """Decode what `to_json` made; the class is the one that was raised."""
        fields = json.loads(data)
        kind = fields.pop("kind")
        return _family()[kind](fields.pop("what"), **fields)

    @staticmethod
    def wrap(error: BaseException, *, item: str = "", rank: int | None = None) -> MdattnError:
        """Give any exception a place in the family, so that it can travel; log its traceback.

        What a library or the system reports is a `DeviceError`; any other exception that isn't ours
        is a bug, an `InternalError`.
        """
        found = error if isinstance(error, MdattnError) else _adopt(error)
        found.item = found.item or item
        found.rank = rank if found.rank is None else found.rank
        if not found.agreed:  # else the rank that it comes from has logged it
            log_traceback(error)
        return found


def name_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """Name ranks that are in order, for example ``ranks 0-2, 5``; the first `most` runs of them."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs[:most])
    more = sum(map(len, runs[most:]))
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}{f' and {more} more' if more else ''}"


def _adopt(error: BaseException) -> MdattnError:
    if isinstance(error, MemoryError):
        what = f"out of host memory ({error})" if str(error) else "out of host memory"
        return DeviceError(what, fix="use more ranks, or -s ring, which holds 1/P of K and V")
    what = f"{type(error).__name__}: {error}"
    found = InternalError(f"{what} {_place(error)}") if _is_bug(error) else DeviceError(what)
    found.__cause__ = error
    return found


def _is_bug(error: BaseException) -> bool:
    """Whether nothing but a mistake in this package explains an exception."""
    if isinstance(error, NotImplementedError | RecursionError):
        return True
    reported = isinstance(error, OSError | ImportError | RuntimeError)
    return not reported and type(error).__module__ == "builtins"


def _place(error: BaseException) -> str:
    """Where an exception was raised, such as ``(loop.py, line 12)``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def log_traceback(error: BaseException) -> None:
    """Write an exception and what led to it into this rank's log, if it has one."""
    if LOGGER.handlers:
        LOGGER.error("%s: %s", type(error).__name__, error, exc_info=error)


class ItemError(MdattnError):
    """One item can't be done; the others can. The job goes on and ends with 1."""

    exit_code = 1


class OutputError(MdattnError):
    """The output can't be written. The job stops; finished items are intact."""

    exit_code = 1


class VerificationError(MdattnError):
    """An output is out of tolerance or doesn't match its checksum."""

    exit_code = 1


class RejectedError(MdattnError):
    """Usage, configuration or input that is refused before any work."""

    exit_code = 2


class DisagreementError(MdattnError):
    """Ranks differ in what they are about to do; nothing was enqueued."""

    exit_code = 3


class DeviceError(MdattnError):
    """A device, an engine or a library failed."""

    exit_code = 4


class InternalError(MdattnError):
    """A bug in this package."""

    exit_code = 4

    def __init__(self, what: str, *, fix: str = "", **where: Any) -> None:
        if not fix:  # new, and not one that came from another rank
            what = f"{what}: this is a bug in mdattn_mpi, and nothing that you did wrong"
            logs = "OUT.h5.run/rank-*.log"
            fix = (
                f"report it, with that rank's traceback, which is in its log ({logs}) or on stderr"
            )
        super().__init__(what, fix=fix, **where)


class InterruptedJobError(MdattnError):
    """Preempted, lost a peer, or out of time: the same command again resumes."""

    exit_code = 75


def _family() -> dict[str, type[MdattnError]]:
    members = [MdattnError]
    for member in members:
        members.extend(member.__subclasses__())
    return {member.__name__: member for member in members}
