"""What stands against cutting a model, collected, so that it is told all at once."""

from __future__ import annotations

from collections.abc import Iterable

from mdattn_mpi.errors import RejectedError

SHOWN = 12


class Faults:
    """The reasons why a model can't be shared, a node each."""

    def __init__(self) -> None:
        self._found: list[RejectedError] = []
        self.tensors: set[str] = set()  # what the nodes make that are at fault, or come after

    def add(self, error: RejectedError, outputs: Iterable[str] = ()) -> None:
        """Note a fault of the node that makes `outputs`."""
        if str(error) not in map(str, self._found):
            self._found.append(error)
        self.tensors.update(outputs)

    def end(self, fix: str = "") -> None:
        """Raise one error for all of them, with a fix for all; nothing where there is none.

        Raises
        ------
        RejectedError
            There are some.

        """
        if not self._found:
            return
        if len(self._found) == 1:
            self._found[0].fix = fix or self._found[0].fix
            raise self._found[0]
        lines = [f"\n  {number}. {error}" for number, error in enumerate(self._found[:SHOWN], 1)]
        more = len(self._found) - SHOWN
        rest = f"\n  … and {more} more" if more > 0 else ""
        raise RejectedError(
            f"{len(self._found)} things stand against cutting this model:{''.join(lines)}{rest}"
            + "\n  all of them come after the last attention" * bool(fix),
            fix=fix,
        )
