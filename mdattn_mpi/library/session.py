"""What stays between the calls on one communicator."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mdattn_mpi.errors import MdattnError, RejectedError

if TYPE_CHECKING:
    from mdattn_mpi.backends import AnyDevice, StrategyBackend
    from mdattn_mpi.lockstep import Agreement, World

KEPT = 256  # of what is remembered; the ranks forget in the same order


@dataclass(eq=False)
class Session:
    """A copy of the program's communicator to talk over, the devices, and what was planned.

    Attributes
    ----------
    made
        What was made for which shapes and options: the same on all ranks, in the same order.
    latest
        What was called last with the same options, by their digest: the same on all ranks.
    under_way
        Calls that nobody has waited for yet.
    over
        Why it can't be used any more; empty while it can.

    """

    comm: Any
    world: World
    made: dict[Any, Any] = field(default_factory=dict)
    latest: dict[int, Any] = field(default_factory=dict)
    under_way: list[Any] = field(default_factory=list)
    over: str = ""
    _backends: dict[str, StrategyBackend] = field(default_factory=dict)
    _users: Counter[str] = field(default_factory=Counter)
    _agreements: int = 0
    _calls: int = 0

    def agree(
        self,
        phase: str,
        facts: Callable[[], dict[str, Any]],
        digest: int,
        *,
        error: MdattnError | None = None,
        word: int | None = None,
        stop: bool = False,
    ) -> Agreement:
        """Collective. Make sure that all ranks do the same, and have no error; see `Group.agree`.

        `word` is a number below 2⁶⁴ for all the others; `stop` is told to all if any rank says so.
        """
        from mdattn_mpi.lockstep import Step

        self._agreements += 1
        step = Step(self._agreements, phase, digest, facts)
        return self.world.agree(step, error=error, word=word, stop=stop)

    def number_of_call(self) -> int:
        """Number calls, alike on all ranks."""
        self._calls += 1
        return self._calls

    def remember(self, key: Any, made: Any) -> None:
        """Keep what was made, and forget what was made long ago."""
        self.made[key] = made
        if len(self.made) > KEPT:
            del self.made[next(iter(self.made))]
            self.latest.clear()

    def has_open(self, name: str, kernel: str) -> bool:
        """Whether the device of a backend is open, so that `device` asks no other rank."""
        return name != "cpu" and f"{name} {kernel}" in self._backends

    @contextmanager
    def device(self, name: str, kernel: str) -> Iterator[AnyDevice]:
        """Collective if it isn't open. The device of a backend, for as long as the block lasts.

        A GPU stays open for the next call. A CPU doesn't: it keeps BLAS to one thread, also when
        the program itself multiplies matrices.
        """
        from mdattn_mpi.backends import StrategyBackend, open_backend

        key = name if name == "cpu" else f"{name} {kernel}"
        if key not in self._backends:
            backend = open_backend(name, self.world, kernel=kernel)
            assert isinstance(backend, StrategyBackend)
            self._backends[key] = backend
        self._users[key] += 1
        try:
            yield self._backends[key].device
        finally:
            self._users[key] -= 1
            if name == "cpu" and not self._users[key]:
                self._backends.pop(key).close()

    @contextmanager
    def left_on_error(self) -> Iterator[None]:
        """Stop using what an error leaves behind.

        Messages may still be under way: they would mix with those of the next call, and write into
        their arrays. So these stay alive, and the next call starts another session.
        """
        try:
            yield
        except BaseException as error:
            self.leave(f"a call on its communicator failed: {error}")
            raise

    @contextmanager
    def left_if_alone(self) -> Iterator[None]:
        """Stop using it after an error that not all ranks raise."""
        try:
            yield
        except BaseException as error:
            if not getattr(error, "agreed", False):
                self.leave(f"a call on its communicator failed: {error}")
            raise

    def leave(self, why: str) -> None:
        """Let the next call start another session; keep what messages may still write into."""
        if self.over:
            return
        self.over = why
        for backend in self._backends.values():
            backend.device.abort()
        _left.append(self)
        self.comm.Delete_attr(_key(self.comm))

    def check_open(self) -> None:
        """Refuse to go on after `leave` or `end`."""
        if self.over:
            raise RejectedError(
                f"this Attention can't be used any more: {self.over}", fix="make another one"
            )

    def end(self) -> None:
        """Collective. Called when the communicator is freed."""
        if self.over:
            return
        self.over = "its communicator was freed"
        if self.under_way:
            _left.append(self)
            return
        for backend in self._backends.values():
            backend.close()
        self.world.free()


_left: list[Session] = []


def session_of(comm: Any, seconds: float) -> Session:
    """Collective on first use. The session that `comm` carries; ranks are waited for `seconds`.

    Raises
    ------
    InterruptedJobError
        Some ranks didn't come before the deadline; on the others, naming them.

    """
    from mdattn_mpi.lockstep import World

    key = _key(comm)
    session: Session | None = comm.Get_attr(key)
    if session is None:
        session = Session(comm, World.of_program(comm, "attention", seconds))
        comm.Set_attr(key, session)
    session.world.deadline = seconds
    return session


def check_comm(comm: Any) -> None:
    """Refuse what isn't a communicator, or one whose ranks can't hold a sequence together.

    Raises
    ------
    RejectedError
        On this rank alone: there is nobody to agree with.

    """
    fix = "give the mpi4py communicator of the ranks that hold the sequence, as MPI.COMM_WORLD"
    if comm is None:
        raise RejectedError("comm is None", fix=fix)
    # Whoever has a communicator has imported it; importing it here could start MPI.
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Comm):
        raise RejectedError(f"comm is a {type(comm).__name__}", fix=fix)
    if comm == mpi.COMM_NULL:
        raise RejectedError(
            "comm is MPI.COMM_NULL: it was freed, or this rank is not in it",
            fix="call on ranks of the communicator only, before it is freed",
        )
    if comm.Is_inter():
        raise RejectedError(
            "comm is an intercommunicator: its two groups don't hold one sequence",
            fix="give an intracommunicator, such as what comm.Merge() returns",
        )


_keys: dict[Any, int] = {}


def _key(comm: Any) -> int:
    """The key under which communicators carry a session; their duplicates don't inherit it."""

    def end(comm: Any, key: int, session: Session) -> None:
        session.end()

    kind = type(comm)
    if kind not in _keys:
        _keys[kind] = kind.Create_keyval(delete_fn=end)
    return _keys[kind]
