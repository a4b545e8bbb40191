"""A counter that all ranks share: every number is given to one rank, to whichever asks first.

MPI has one-sided atomics for this, but where the network has none in hardware they wait until the
owner of the counter enters the MPI library: measured, three seconds while it computed for three
(MPICH without shared memory). So rank 0 answers from a thread, in a few milliseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep
from types import TracebackType

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep.mpi import MPI, threads_may_call

CLOSED = 1 << 62  # larger than any number of items
_CLAIM, _CLOSE, _ANSWER = 1, 2, 3
_ASLEEP = 2e-3  # seconds between two looks of rank 0's thread: 0.1 % of a core
_WAITING = 1e-4
_IDLE = 5e-3
_QUICK = 0.2


class SharedCounter:
    """Counters 0 … ``slots`` - 1, kept on rank 0 of `comm`.

    Collective, and so is leaving it as a context: nobody leaves while another may still ask.
    `meanwhile` is called again and again in this wait.

    Raises
    ------
    RejectedError
        The MPI library allows no calls from threads.

    """

    def __init__(
        self, comm: MPI.Comm, slots: int, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        if not threads_may_call():
            raise RejectedError(
                "this MPI library doesn't allow calls from several threads, which sharing items "
                "among groups needs",
                fix="use --group-size all, or an MPI built with MPI_THREAD_MULTIPLE",
            )
        self._comm = comm.Dup()
        self._meanwhile = meanwhile
        self._next = [0] * slots
        self._claimed = -_QUICK
        self._lock = threading.Lock()
        self._asked: tuple[int, MPI.Request, np.ndarray[tuple[int], np.dtype[np.int64]]] | None
        self._asked = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self._comm.rank == 0 and self._comm.size > 1:
            self._thread = threading.Thread(target=self._serve, name="mdattn-counter", daemon=True)
            self._thread.start()

    def _ask(self, slot: int) -> None:
        if self._asked is not None and self._asked[0] != slot:
            self._answer()  # that slot is exhausted
        if self._asked is not None:
            return
        answer = np.full(1, -1, np.int64)
        if self._comm.rank == 0:
            answer[0] = self._next_number(slot)
            request = MPI.REQUEST_NULL
        else:
            request = self._comm.Irecv(answer, 0, _ANSWER)
            self._comm.Send(np.array([slot], np.int64), 0, _CLAIM)
        self._asked = slot, request, answer

    def claim(self, slot: int) -> int:
        """Claim a number of `slot` that nobody else has; at least `CLOSED` after `close`.

        A rank that claims one after the other asks for the next in advance, so that it needn't
        wait; one with much to do in between leaves the next number to whoever is free first.
        """
        self._ask(slot)
        number = self._answer()
        now = monotonic()
        if self._comm.rank and now - self._claimed < _QUICK:
            self._ask(slot)
        self._claimed = now
        return number

    def _answer(self) -> int:
        assert self._asked is not None
        _, request, answer = self._asked
        while not request.Test():
            sleep(_WAITING)
        self._asked = None
        return int(answer[0])

    def close(self) -> None:
        """Give out no more numbers: the job is to stop."""
        if self._comm.rank == 0:
            self._close()
        else:
            self._comm.Send(np.zeros(1, np.int64), 0, _CLOSE)

    def _next_number(self, slot: int) -> int:
        with self._lock:
            number = self._next[slot]
            self._next[slot] += 1
            return number

    def _close(self) -> None:
        with self._lock:
            self._next = [number + CLOSED for number in self._next]

    def _serve(self) -> None:
        status, question = MPI.Status(), np.empty(1, np.int64)
        while not self._ended.is_set():
            if not self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
                self._ended.wait(_ASLEEP)
                continue
            self._comm.Recv(question, status.source, status.tag)
            if status.tag == _CLOSE:
                self._close()
            else:
                answer = np.array([self._next_number(int(question[0]))], np.int64)
                self._comm.Send(answer, status.source, _ANSWER)

    def __enter__(self) -> SharedCounter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            if self._asked is not None:
                self._answer()
            barrier = self._comm.Ibarrier()
            while not barrier.Test():
                self._meanwhile()
                sleep(_IDLE)
        self._ended.set()
        if self._thread is not None:
            self._thread.join(1.0)
        if kind is None:
            self._comm.Free()
