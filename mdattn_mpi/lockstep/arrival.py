"""Waiting for all ranks of a communicator with a deadline, and naming those that don't come.

A job has watchdogs for this; another MPI program that calls the library hasn't.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from time import monotonic, sleep
from typing import Any, cast

import numpy as np

from mdattn_mpi.errors import InterruptedJobError, RejectedError, name_ranks
from mdattn_mpi.lockstep.mpi import MPI

VARIABLE = "MDATTN_DEADLINE"
DEFAULT = 600.0  # seconds
_SPIN = 2e-3  # seconds in which ranks that work alike arrive
_PAUSE = 5e-4
TAG = 13
_AT_ONCE = 32  # MPICH sends so many, then waits: one missing rank would hide those after it

# Requests that nobody waits for any more, with their buffers: a late rank may still write there.
_abandoned: list[object] = []


def call_deadline(
    seconds: float | None = None, environment: Mapping[str, str] = os.environ
) -> float:
    """Seconds to wait for ranks that never come: `seconds`, else ``MDATTN_DEADLINE``, else 600.

    Raises
    ------
    RejectedError
        That isn't a positive number of seconds.

    """
    name, value = "deadline", str(seconds)
    if seconds is None:
        name, value = VARIABLE, environment.get(VARIABLE) or str(DEFAULT)
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise RejectedError(f"{name} is {value!r}", fix="give seconds above 0, such as 600, or inf")
    return found


def wait_for_all(comm: MPI.Intracomm, what: str, deadline: float) -> None:
    """Collective. Wait until all ranks of `comm` have come to `what`, for `deadline` seconds.

    Every rank sends a byte to every other one, in a collective of MPI's: it can't be taken for a
    message of the program whose communicator this is.

    Raises
    ------
    InterruptedJobError
        On every rank that is there, with the missing ones named. `comm` is of no use after that.

    """
    here, came = np.ones(1, np.uint8), np.zeros(comm.size, np.uint8)
    ranks = range(comm.size)
    requests = []
    for first in range(0, comm.size, _AT_ONCE):
        some = range(first, first + _AT_ONCE)
        to = [int((comm.rank - rank) % comm.size in some) for rank in ranks]
        of = [int((rank - comm.rank) % comm.size in some) for rank in ranks]
        requests.append(
            comm.Ialltoallv(
                [here, to, [0] * comm.size, MPI.BYTE], [came, of, list(ranks), MPI.BYTE]
            )
        )
    if not in_time(requests, deadline):
        _abandoned.append((requests, here, came))
        missing = [rank for rank in ranks if not came[rank] and rank != comm.rank]
        raise missing_ranks(missing, what, deadline)


class Arrivals:
    """Waiting for the ranks of a communicator of our own, again and again.

    A byte goes from every rank to every other one in messages that are prepared once: on two ranks
    that took 22 µs, where the collective of `wait_for_all` takes 81.

    Parameters
    ----------
    comm
        Nobody else receives messages with `TAG` on it.

    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._here, self._came = np.ones(1, np.uint8), np.zeros(comm.size, np.uint8)
        others = [(comm.rank + step) % comm.size for step in range(1, comm.size)]
        self._requests: list[MPI.Request] = [
            *(comm.Recv_init([self._came[rank:], 1, MPI.BYTE], rank, TAG) for rank in others),
            *(comm.Send_init([self._here, 1, MPI.BYTE], rank, TAG) for rank in others),
        ]

    def wait(self, what: str, deadline: float) -> None:
        """Collective. As `wait_for_all`."""
        self._came[:] = 0
        MPI.Prequest.Startall(cast(Any, self._requests))
        if not in_time(self._requests, deadline):
            _abandoned.append(self)
            ranks = range(self._comm.size)
            missing = [rank for rank in ranks if not self._came[rank] and rank != self._comm.rank]
            raise missing_ranks(missing, what, deadline)

    def free(self) -> None:
        """Give the requests back; none is under way."""
        for request in self._requests:
            request.Free()


def duplicate(comm: MPI.Intracomm, what: str, deadline: float) -> MPI.Intracomm:
    """Collective. Duplicate `comm` once all its ranks have come to `what`; see `wait_for_all`."""
    wait_for_all(comm, what, deadline)
    copy, request = comm.Idup()  # some may have given up at the very moment when the last one came
    if not in_time([request], deadline):
        _abandoned.append((request, copy))
        raise missing_ranks([], what, deadline)
    return copy


def in_time(requests: list[MPI.Request], deadline: float) -> bool:
    """Whether all requests are complete within `deadline` seconds."""
    began = monotonic()
    while not MPI.Request.Testall(requests):
        waited = monotonic() - began
        if waited > deadline:
            return False
        if waited > _SPIN:
            sleep(_PAUSE)
    return True


def missing_ranks(missing: list[int], what: str, deadline: float) -> InterruptedJobError:
    """Make the error that names the ranks that never came."""
    return InterruptedJobError(
        f"{name_ranks(missing) if missing else 'some rank'} never reached {what} (waited "
        f"{deadline:g} s)",
        fix="let every rank of the communicator make the same calls; if it is only late, give more "
        f"seconds: deadline=, or {VARIABLE}",
    )
