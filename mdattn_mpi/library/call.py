"""One call under way, from its first transfers to what the caller is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.library.arrays import Shards, crc32_of
from mdattn_mpi.library.session import Session
from mdattn_mpi.problem import Plan, digest_of

if TYPE_CHECKING:
    from mdattn_mpi.backends import AnyDevice
    from mdattn_mpi.lockstep import Agreement


@dataclass(eq=False)
class Planned:
    """What calls of one plan have in common.

    Attributes
    ----------
    options
        The strategy's; None before the first call.
    started
        Calls that `Attention.start` has made, and nobody has waited for.

    """

    session: Session
    plan: Plan
    kernel: str
    options: dict[str, Any] | None = None
    started: deque[Call] = field(default_factory=deque)

    def options_on(self, device: AnyDevice) -> dict[str, Any]:
        """Return the strategy's options."""
        if self.options is None:
            from mdattn_mpi.strategies import options_alone

            self.options = options_alone(device, self.plan)
        return self.options

    def begin_alone(self, shards: Shards) -> Call | None:
        """Begin a call, unless something of it needs another rank: an agreement has to follow."""
        session, name = self.session, self.plan.backend
        if self.options is None or session.over or not session.has_open(name, self.kernel):
            return None
        call = Call(self, shards)
        try:
            if call.open_device().is_ready(self.plan, **self.options):
                call.first_half()
                return call
        except BaseException:
            call.undo()
            raise
        call.undo()
        return None

    def crc32_of(self, sinks: Any) -> int:
        """Bring sinks from the GPU, to compare them: once, because it waits for the GPU."""
        with self.session.device(self.plan.backend, self.kernel) as device:
            (found,) = device.download(device.adopt(sinks)).wait()
        return crc32_of(found)


class Call:
    """One attention under way; `Attention.start` makes it."""

    def __init__(self, planned: Planned, shards: Shards) -> None:
        self._planned = planned
        self._shards = shards
        self._open = ExitStack()  # the device, until the call has been waited for
        self._number = 0
        self._device: AnyDevice
        self._steps: Generator[None, None, tuple[Any, Any]] | None = None
        self._result: tuple[Any, Any] | None = None

    def begin(self) -> None:
        """Collective. Begin what wasn't begun alone; nobody computes before all have their buffers.

        What all ranks have begun alone needs no second agreement: the one after it told them all.
        """
        session, plan = self._planned.session, self._planned.plan
        self._number = session.number_of_call()
        with session.left_on_error():
            session.under_way.append(self)
            if self._steps is None:
                error = None
                try:
                    self.open_device()
                    self.first_half()
                except Exception as wrong:  # all ranks must hear of it
                    error = MdattnError.wrap(wrong, rank=session.world.rank)
                session.agree("enqueue", plan.facts, plan.digest, error=error)
            if plan.backend == "cuda":  # beside its host; a CPU computes while it is waited for
                self._compute()

    def open_device(self) -> AnyDevice:
        """Collective where it isn't open."""
        planned = self._planned
        opened = planned.session.device(planned.plan.backend, planned.kernel)
        self._device = self._open.enter_context(opened)
        return self._device

    def first_half(self) -> None:
        """Collective, unless the device is ready. Post the first transfers."""
        from mdattn_mpi.strategies import STRATEGIES

        plan, device = self._planned.plan, self._device
        arrays = map(device.adopt, self._shards.arrays)
        options = self._planned.options_on(device)
        self._steps = device.perform(STRATEGIES[plan.strategy], plan, *arrays, **options)
        next(self._steps)

    def undo(self) -> None:
        """Undo what was begun alone."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        self._open.close()

    def _compute(self) -> None:
        assert self._steps is not None
        self._result = run_to_end(self._steps)

    def wait(self) -> Any:
        """Collective. Return the output, or output and LSE, as `attention` does.

        Raises
        ------
        RejectedError
            It was waited for before, or another call on its communicator has failed since.
        DisagreementError
            Other ranks wait for another call, or start one. The same error on all ranks.
        InterruptedJobError
            Some ranks didn't come before the deadline; on the others, naming them.

        """
        session, plan = self._planned.session, self._planned.plan
        if self not in session.under_way:
            raise RejectedError(
                "this call was waited for before", fix="keep what wait() returns; it gives it once"
            )
        session.check_open()
        with session.left_on_error():
            if self._result is None:
                facts = {"call": self._number}
                session.agree("wait", lambda: facts, digest_of(facts))
                self._compute()
            assert self._result is not None
            results = self._result if plan.lse else self._result[:1]
            given = [self._shards.give(self._device.export(result)) for result in results]
            self._open.close()
        session.under_way.remove(self)
        if self in self._planned.started:
            self._planned.started.remove(self)
        del self._shards, self._steps, self._result
        return tuple(given) if plan.lse else given[0]


@contextmanager
def undone_on_error(call: Call | None) -> Iterator[None]:
    """Undo what was begun alone of a call that isn't going to be."""
    try:
        yield
    except BaseException:
        if call is not None:
            call.undo()
        raise


def begun_by_all(call: Call | None, agreed: Agreement) -> Call | None:
    """Return what this rank has begun alone, if all have; else undo it.

    In the agreement, a rank that hasn't said ``stop``.
    """
    if call is not None and agreed.stop:
        call.undo()
        return None
    return call
