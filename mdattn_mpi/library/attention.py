"""The call, and the object that plans once for many calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.library.arrays import Shards, crc32_of, shards_of
from mdattn_mpi.library.options import Options
from mdattn_mpi.library.request import SINKS, Request, agree_on, plan_of
from mdattn_mpi.library.session import Session
from mdattn_mpi.library.spans import Order
from mdattn_mpi.mask import UNBOUNDED
from mdattn_mpi.problem import (
    Causal,
    KernelName,
    Plan,
    StrategyName,
    digest_of,
)

if TYPE_CHECKING:
    from mdattn_mpi.backends import AnyDevice


def attention(
    comm: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Causal = "none",
    scale: float | None = None,
    window: tuple[int, int] = UNBOUNDED,
    softcap: float = 0.0,
    sinks: Any = None,
    segments: Sequence[int] = (),
    strategy: Literal["auto"] | StrategyName = "auto",
    kernel: Literal["auto"] | KernelName = "auto",
    order: Order = "contiguous",
    return_lse: bool = False,
    deadline: float | None = None,
) -> Any:
    """Collective. Attend to a sequence that the ranks of `comm` hold together.

    What was planned is kept for the next call with the same shapes and options.

    Parameters
    ----------
    comm
        An mpi4py intracommunicator. The first call duplicates it.
    q, k, v
        This rank's shards, ``[Sq, Nq, H]``, ``[Skv, Nkv, H]`` and ``[Skv, Nkv, Hv]``, all bfloat16
        (`ml_dtypes.bfloat16` in NumPy) or all float16: NumPy arrays, PyTorch tensors on the CPU, or
        arrays on the GPU of the rank's local rank that offer DLPack. A rank may hold no token.
    causal
        ``none``, ``upper_left`` or ``lower_right``, of the whole sequence.
    scale
        What scores are multiplied with; by default 1/√H.
    window
        How many keys before and after the diagonal a query sees, besides the one on it; -1: all
        that `causal` lets through. The diagonal is the one that `causal` names, else that of keys
        with the query's own number.
    softcap
        Scores become ``softcap · tanh(score / softcap)``; 0: they stay as they are.
    sinks
        ``[Nq]`` float32, the same on all ranks, where `q` is: a score of each query head that takes
        weight and has no value. It is neither scaled nor capped. Ranks compare them in each call,
        on GPUs in the first of its kind.
    segments
        The first tokens of documents that are packed into the sequence, ascending from 0: a query
        sees those of its own document alone. Sq = Skv.
    strategy
        ``ring``, ``allgather``, ``ulysses``, or ``auto``, which picks one of them.
    kernel
        What attends on GPUs: ``cudnn``, ``flash`` (FlashAttention 4), or ``auto``, the faster one
        of those that are there. Each that is used opens the GPU once more, with memory of its own.
    order
        Which tokens the shards are. ``contiguous``: in rank order, any number on each rank.
        ``zigzag``: those that `shard_spans` gives, which balances the work under a causal mask.
    return_lse
        Return the natural logarithm of each row's softmax denominator too.
    deadline
        Seconds to wait for ranks that don't come; by default the environment variable
        ``MDATTN_DEADLINE``, else 600.

    Returns
    -------
    out
        ``[Sq, Nq, Hv]`` for this rank's query tokens, in the dtype of `q`; 0 where no key is seen.
        As `q` is: a NumPy array, a PyTorch tensor, or on the GPU an array that offers DLPack.
    lse
        ``[Sq, Nq]`` float32, only with `return_lse`, sinks included; −∞ where nothing is seen, and
        infinite where float32 doesn't hold it.

    Raises
    ------
    RejectedError
        Invalid arrays, options or sizes. The same error on all ranks, unless `comm` itself is
        invalid.
    DisagreementError
        Ranks differ in heads, dtype, options or sinks. The same error on all ranks.
    DeviceError
        A rank has no memory for its buffers, for example. The same error on all ranks.
    InterruptedJobError
        Some ranks didn't come before the deadline; on the others, naming them.

    """
    masks = window, softcap, sinks is not None, segments
    options = Options(causal, scale, strategy, kernel, order, return_lse, *masks)  # type: ignore[arg-type]
    request = agree_on(comm, (q, k, v, sinks), options, deadline)
    made = request.session.made.get(request.key)
    if made is None:
        made = Attention.__new__(Attention)
        made._plan_for(request)
        request.session.remember(request.key, made)
    return made._begin(request.shards).wait()


class Attention:
    """Attention made once for shapes and options, for any number of calls.

    Making it is collective, and so are `start` and `Call.wait`: all ranks make the same calls in
    the same order. Two calls and more may be under way at a time: the transfers of one then run
    while another one computes.

    Parameters
    ----------
    comm, causal, scale, window, softcap, segments, strategy, kernel, order, return_lse, deadline
        As in `attention`.
    sinks
        As in `attention`; all calls take what they hold by then.
    q, k, v
        Arrays of the shapes and dtype that all calls will bring, in the place where they will be.
        Their contents are not looked at.

    Raises
    ------
    MdattnError
        As `attention` does.

    """

    _session: Session
    _plan: Plan
    _kernel: str
    _expected: str
    _started: deque[Call]
    _strategy_options: dict[str, Any] | None
    _sinks: Any

    def __init__(
        self,
        comm: Any,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: Causal = "none",
        scale: float | None = None,
        window: tuple[int, int] = UNBOUNDED,
        softcap: float = 0.0,
        sinks: Any = None,
        segments: Sequence[int] = (),
        strategy: Literal["auto"] | StrategyName = "auto",
        kernel: Literal["auto"] | KernelName = "auto",
        order: Order = "contiguous",
        return_lse: bool = False,
        deadline: float | None = None,
    ) -> None:
        masks = window, softcap, sinks is not None, segments
        options = Options(causal, scale, strategy, kernel, order, return_lse, *masks)  # type: ignore[arg-type]
        self._sinks = sinks
        self._plan_for(agree_on(comm, (q, k, v, sinks), options, deadline))

    def _plan_for(self, request: Request) -> None:
        """Collective. Plan; all that is collective and the same for every call is done here."""
        from mdattn_mpi.lockstep import together

        self._session = session = request.session
        self._kernel = request.options.kernel
        self._expected = _kind(request.shards)
        self._started = deque()
        self._strategy_options = None
        with session.left_if_alone():
            self._plan = together(session.world, "plan", lambda: plan_of(request), Plan.facts)
            if self._plan.problem.sinks and self._plan.backend == "cuda":
                together(session.world, "sinks", lambda: self._read(request.shards.sinks), dict)

    def __repr__(self) -> str:
        """What it computes, and how."""
        return f"<Attention: {self._plan.problem}; {self._plan.strategy}, {self._plan.ranks} ranks>"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this strategy, its estimate, and whether one rank alone would be faster."""
        return self._plan.reasons

    def start(self, q: Any, k: Any, v: Any) -> Call:
        """Collective. Start a call; it needn't be waited for before the next is started.

        Parameters
        ----------
        q, k, v
            This rank's shards, of the shapes and the dtype that this was made for. They are not
            to be written before the call has been waited for.

        Returns
        -------
        Call
            Its `wait` gives the output; so does `wait` here, for one call after the other.

        Raises
        ------
        RejectedError
            A rank's arrays differ from those that this was made for. The same error on all ranks,
            and no call has started.
        DeviceError
            A rank has no memory for its buffers, for example. The same error on all ranks.
        InterruptedJobError
            Some ranks didn't come before the deadline; on the others, naming them.

        """
        self._session.check_open()
        error = None
        try:
            shards = shards_of(q, k, v, self._sinks)
            self._check(shards)
        except Exception as wrong:  # all ranks must hear of it
            error = MdattnError.wrap(wrong, rank=self._session.world.rank)
        with self._session.left_if_alone():
            sinks = 0 if error else shards.sinks_crc32
            self._session.agree(
                "start",
                lambda: {**self._plan.facts(), SINKS: sinks},
                self._plan.digest ^ sinks,
                error=error,
            )
        call = self._begin(shards)
        self._started.append(call)
        return call

    def wait(self) -> Any:
        """Collective. Return the output of the oldest call that hasn't been waited for.

        See `Call.wait`.
        """
        if not self._started:
            raise RejectedError("no call is under way", fix="call start(q, k, v) before wait()")
        return self._started[0].wait()

    def _check(self, shards: Shards) -> None:
        found = _kind(shards)
        if found != self._expected:
            raise RejectedError(
                f"q, k, v are {found}; this Attention was made for {self._expected}",
                fix="make another one for other shapes, or call attention()",
            )

    def _read(self, sinks: Any) -> dict[str, int]:
        """Bring sinks to the host, to compare them: once, because it waits for the GPU."""
        with self._session.device("cuda", self._kernel) as device:
            (found,) = device.download(device.adopt(sinks)).wait()
        return {SINKS: crc32_of(found)}

    def _options_on(self, device: AnyDevice) -> dict[str, Any]:
        """Return the strategy's options: where a call stands alone it hides behind itself."""
        if self._strategy_options is None:
            alone = self._plan.strategy == "allgather"
            start = {"head_start": device.head_start(self._plan.problem)} if alone else {}
            self._strategy_options = start
        return self._strategy_options

    def _begin(self, shards: Shards) -> Call:
        """Collective. Start a call with arrays that were agreed on."""
        call = Call(self, shards)
        call._begin()
        return call


class Call:
    """One attention under way; `Attention.start` makes it."""

    def __init__(self, made: Attention, shards: Shards) -> None:
        self._made = made
        self._shards = shards
        self._number = made._session.number_of_call()
        self._open = ExitStack()  # the device, until the call has been waited for
        self._device: AnyDevice
        self._steps: Generator[None, None, tuple[Any, Any]]
        self._result: tuple[Any, Any] | None = None

    def _begin(self) -> None:
        """Collective. Post the first transfers; nobody computes before all have their buffers."""
        from mdattn_mpi.strategies import STRATEGIES

        session, plan = self._made._session, self._made._plan
        error = None
        with session.left_on_error():
            session.under_way.append(self)
            try:
                device = self._device = self._open.enter_context(
                    session.device(plan.backend, self._made._kernel)
                )
                arrays = map(device.adopt, self._shards.arrays)
                options = self._made._options_on(device)
                attend = STRATEGIES[plan.strategy]
                self._steps = device.perform(attend, plan, *arrays, **options)
                next(self._steps)
            except Exception as wrong:  # all ranks must hear of it
                error = MdattnError.wrap(wrong, rank=session.world.rank)
            session.agree("enqueue", plan.facts, plan.digest, error=error)
            if plan.backend == "cuda":  # beside its host; a CPU computes while it is waited for
                self._compute()

    def _compute(self) -> None:
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
        session, plan = self._made._session, self._made._plan
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
        if self in self._made._started:
            self._made._started.remove(self)
        del self._shards, self._steps, self._result
        return tuple(given) if plan.lse else given[0]


def _kind(shards: Shards) -> str:
    """What calls of one `Attention` have in common, such as ``bfloat16 (4, 2, 8), … on cpu``."""
    return f"{shards.dtype} {', '.join(map(str, shards.shapes))} on {shards.backend}"
