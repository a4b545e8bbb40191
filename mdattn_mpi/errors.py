"""The exception family, and the exit code that each member gives the job."""

from __future__ import annotations

import json
from typing import ClassVar


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
        return json.dumps(
            {"kind": type(self).__name__, "what": self.what, **self._where()}
        ).encode()

    def _where(self) -> dict[str, object]:
        return {"fix": self.fix, "file": self.file, "item": self.item, "rank": self.rank}

    @staticmethod
    def from_json(data: bytes) -> MdattnError:
        """Decode what `to_json` made; the class is the one that was raised."""
        fields = json.loads(data)
        kind = fields.pop("kind")
        return _family()[kind](fields.pop("what"), **fields)

    @staticmethod
    def wrap(error: BaseException, *, item: str = "", rank: int | None = None) -> MdattnError:
        """Give any exception a place in the family, so that it can travel."""
        if isinstance(error, MdattnError):
            error.item = error.item or item
            error.rank = rank if error.rank is None else error.rank
            return error
        if isinstance(error, MemoryError):
            what = f"out of host memory ({error})" if str(error) else "out of host memory"
            return DeviceError(
                what,
                fix="use more ranks, or -s ring, which holds 1/P of K and V",
                item=item,
                rank=rank,
            )
        return DeviceError(f"{type(error).__name__}: {error}", item=item, rank=rank)


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


class InterruptedJobError(MdattnError):
    """Preempted, lost a peer, or out of time: the same command again resumes."""

    exit_code = 75


def _family() -> dict[str, type[MdattnError]]:
    members = [MdattnError]
    for member in members:
        members.extend(member.__subclasses__())
    return {member.__name__: member for member in members}
