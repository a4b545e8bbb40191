"""The call, and the object that plans once for many calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.library.arrays import Shards, shards_of
from mdattn_mpi.library.call import Call, Planned, begun_by_all, undone_on_error
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
)


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
        ``ring``, ``allgather``, ``ulysses``, ``hierarchical`` (where the ranks are several nodes of
        as many each, node after node), or ``auto``, which picks one of them.
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
    request = agree_on(comm, (q, k, v, sinks), options, deadline, _begin_latest)
    session, key = request.session, request.key
    made = session.made.get(key)
    if made is None:
        made = Attention.__new__(Attention)
        made._plan_for(request)
        session.remember(key, made)
    session.latest[key[0]] = made
    call = request.call or Call(made._planned, request.shards)
    call.begin()
    return call.wait()


def _begin_latest(session: Session, digest: int, shards: Shards) -> Call | None:
    """Begin what was called last with these options, if it fits and needs no other rank."""
    made: Attention | None = session.latest.get(digest)
    if made is None or _kind(shards) != made._expected:
        return None
    return made._planned.begin_alone(shards)


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

    _planned: Planned
    _expected: str
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

        session, sinks = request.session, request.shards.sinks
        self._expected = _kind(request.shards)
        with session.left_if_alone():
            plan = together(session.world, "plan", lambda: plan_of(request), Plan.facts)
            planned = self._planned = Planned(session, plan, request.options.kernel)
            if plan.problem.sinks and plan.backend == "cuda":
                together(session.world, "sinks", lambda: {SINKS: planned.crc32_of(sinks)}, dict)

    def __repr__(self) -> str:
        """What it computes, and how."""
        plan = self._planned.plan
        return f"<Attention: {plan.problem}; {plan.strategy}, {plan.ranks} ranks>"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this strategy, its estimate, and whether one rank alone would be faster."""
        return self._planned.plan.reasons

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
        planned, session, plan = self._planned, self._planned.session, self._planned.plan
        session.check_open()
        error, sinks, call = None, 0, None
        try:
            shards = shards_of(q, k, v, self._sinks)
            self._check(shards)
            sinks = shards.sinks_crc32
            call = planned.begin_alone(shards)
        except Exception as wrong:  # all ranks must hear of it
            error = MdattnError.wrap(wrong, rank=session.world.rank)
        with session.left_if_alone(), undone_on_error(call):
            agreed = session.agree(
                "start",
                lambda: {**plan.facts(), SINKS: sinks},
                plan.digest ^ sinks,
                error=error,
                stop=call is None,
            )
        call = begun_by_all(call, agreed) or Call(planned, shards)
        call.begin()
        planned.started.append(call)
        return call

    def wait(self) -> Any:
        """Collective. Return the output of the oldest call that hasn't been waited for.

        See `Call.wait`.
        """
        if not self._planned.started:
            raise RejectedError("no call is under way", fix="call start(q, k, v) before wait()")
        return self._planned.started[0].wait()

    def _check(self, shards: Shards) -> None:
        found = _kind(shards)
        if found != self._expected:
            raise RejectedError(
                f"q, k, v are {found}; this Attention was made for {self._expected}",
                fix="make another one for other shapes, or call attention()",
            )


def _kind(shards: Shards) -> str:
    """What calls of one `Attention` have in common, such as ``bfloat16 (4, 2, 8), … on cpu``."""
    return f"{shards.dtype} {', '.join(map(str, shards.shapes))} on {shards.backend}"
