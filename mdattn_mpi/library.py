"""Attention for another MPI program, on the shards that its ranks already hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from mdattn_mpi.errors import MdattnError, RejectedError
from mdattn_mpi.partition import contiguous, token_count, zigzag
from mdattn_mpi.problem import (
    AttentionProblem,
    Causal,
    DTypeName,
    Partition,
    Plan,
    Span,
    StrategyName,
    digest_of,
    scale_of,
)

if TYPE_CHECKING:
    from mdattn_mpi.backends import Backend
    from mdattn_mpi.lockstep import World

Order = Literal["contiguous", "zigzag"]


def shard_spans(
    tokens: int, rank: int, ranks: int, order: Order = "contiguous"
) -> tuple[Span, ...]:
    """Tell which tokens of a sequence a rank holds, one span after the other in one array.

    Parameters
    ----------
    tokens
        The length of the whole sequence.
    rank, ranks
        Which of how many ranks.
    order
        ``contiguous``: one run a rank, in rank order. ``zigzag``: chunks ``r`` and ``2P-1-r`` of
        ``2P``, so that under a causal mask all ranks have the same work.

    Raises
    ------
    RejectedError
        There is no such rank, length or order.

    """
    _check_order(order)
    if not 0 <= rank < ranks or tokens < 0:
        raise RejectedError(
            f"rank {rank} of {ranks}, {tokens} tokens", fix="use 0 <= rank < ranks and tokens >= 0"
        )
    owners = zigzag if order == "zigzag" else contiguous
    return owners(tokens, ranks)[rank]


def attention(
    comm: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Causal = "none",
    scale: float | None = None,
    strategy: Literal["auto"] | StrategyName = "auto",
    order: Order = "contiguous",
    return_lse: bool = False,
) -> Any:
    """Collective. Attend to a sequence that the ranks of `comm` hold together.

    Parameters
    ----------
    comm
        An mpi4py intracommunicator. The first call duplicates it.
    q, k, v
        This rank's shards, ``[Sq, Nq, H]``, ``[Skv, Nkv, H]`` and ``[Skv, Nkv, Hv]``, all bfloat16
        (`ml_dtypes.bfloat16`) or all float16: NumPy arrays, or arrays on the GPU of the rank's
        local rank that offer DLPack. A rank may hold no token.
    causal
        ``none``, ``upper_left`` or ``lower_right``, of the whole sequence.
    scale
        What scores are multiplied with; by default 1/√H.
    strategy
        ``ring``, ``allgather``, ``ulysses``, or ``auto``, which picks one of them.
    order
        Which tokens the shards are. ``contiguous``: in rank order, any number on each rank.
        ``zigzag``: those that `shard_spans` gives, which balances the work under a causal mask.
    return_lse
        Return the natural logarithm of each row's softmax denominator too.

    Returns
    -------
    out
        ``[Sq, Nq, Hv]`` for this rank's query tokens, in the dtype of `q`; 0 where no key is seen.
        A NumPy array, or one on the GPU that offers DLPack.
    lse
        ``[Sq, Nq]`` float32, only with `return_lse`; −∞ where no key is seen, and infinite where
        float32 doesn't hold it.

    Raises
    ------
    RejectedError
        Arrays, options or sizes that can't be. The same error on all ranks.
    DisagreementError
        Ranks differ in heads, dtype or options. The same error on all ranks.
    DeviceError
        A rank has no memory for its buffers, for example. The same error on all ranks.

    """
    options = _Options(causal, scale, strategy, order, bool(return_lse))
    session = _session_of(comm)
    shards = _agree_on_shards(session.world, (q, k, v), options)
    problem, owners = _whole(session.world, shards, options)
    with session.device(shards.backend) as device:
        plan = _plan(device, shards.backend, problem, owners, options)
        with session.left_on_error(device):
            out, lse = _attend(session.world, device, plan, shards)
    return (out, lse) if return_lse else out


class _Options(NamedTuple):
    causal: Causal
    scale: float | None
    strategy: Literal["auto"] | StrategyName
    order: Order
    return_lse: bool


class _Shards(NamedTuple):
    """A rank's own arrays, and the backend that takes them where they live."""

    q: Any
    k: Any
    v: Any
    dtype: DTypeName
    backend: str


def _agree_on_shards(world: World, arrays: Sequence[Any], options: _Options) -> _Shards:
    """Collective. Check this rank's arrays, and that all ranks were called alike."""
    from mdattn_mpi.lockstep import Step

    error, shards, facts = None, None, dict[str, Any]()
    try:
        shards = _check_arrays(*arrays)
        facts = {
            **_check_options(options)._asdict(),
            "dtype": shards.dtype,
            "backend": shards.backend,
            "heads and head dims of q, k, v": [list(array.shape[1:]) for array in shards[:3]],
        }
    except Exception as wrong:  # all ranks must hear of it
        error = MdattnError.wrap(wrong, rank=world.rank)
    world.agree(Step(0, "attention", digest_of(facts), lambda: facts), error=error)
    assert shards
    return shards


def _check_options(options: _Options) -> _Options:
    """Check them; a scale of NumPy's becomes a plain number, which all ranks can compare."""
    _check_order(options.order)
    for name, choices in (("causal", Causal), ("strategy", StrategyName)):
        value, allowed = getattr(options, name), get_args(choices)
        if value not in allowed and (name, value) != ("strategy", "auto"):
            raise RejectedError(f"{name} is {value!r}", fix=f"use {', '.join(allowed)}")
    scale = None if options.scale is None else scale_of(options.scale)
    return options._replace(scale=scale)


def _check_order(order: str) -> None:
    if order not in get_args(Order):
        raise RejectedError(f"order is {order!r}", fix="use contiguous or zigzag")


def _check_arrays(q: Any, k: Any, v: Any) -> _Shards:
    backends = {_backend_for(array) for array in (q, k, v)}
    dtypes = {_dtype_name(array) for array in (q, k, v)}
    shapes = [tuple(array.shape) for array in (q, k, v)]
    if len(backends) > 1 or len(dtypes) > 1 or not dtypes <= set(get_args(DTypeName)):
        raise RejectedError(
            f"q, k, v are {', '.join(_dtype_name(array) for array in (q, k, v))}",
            fix="give all three as ml_dtypes.bfloat16 or all as float16, in one place",
        )
    if {len(shape) for shape in shapes} != {3}:
        raise RejectedError(
            f"q, k, v have shapes {', '.join(map(str, shapes))}",
            fix="give [tokens, heads, head dim] each; an item without a batch dim at a time",
        )
    if shapes[1][:2] != shapes[2][:2] or shapes[0][2] != shapes[1][2]:
        raise RejectedError(
            f"q, k, v have shapes {', '.join(map(str, shapes))}",
            fix="give k and v the same tokens and heads, and q and k the same head dim",
        )
    return _Shards(q, k, v, dtypes.pop(), backends.pop())


def _backend_for(array: Any) -> str:
    """Name the backend that takes an array where it lives."""
    if isinstance(array, np.ndarray) and array.dtype.isnative:
        return "cpu"
    if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack_device__"):
        kind, _ = array.__dlpack_device__()
        if kind == _CUDA:
            return "cuda"
    raise RejectedError(
        f"{type(array).__name__} is neither a NumPy array of native byte order nor on a GPU",
        fix="give NumPy arrays, or arrays on a GPU that offer DLPack",
    )


_CUDA = 2  # DLPack's kDLCUDA


def _dtype_name(array: Any) -> Any:
    """The name without the library's: PyTorch says ``torch.bfloat16``."""
    return str(array.dtype).rpartition(".")[2]


def _whole(world: World, shards: _Shards, options: _Options) -> tuple[AttentionProblem, Partition]:
    """Collective. Put together the problem and its partition from what each rank holds."""
    own = np.array([len(shards.q), len(shards.k)], np.int64)
    sizes = np.empty((world.size, 2), np.int64)
    world.control.Allgather(own, sizes)
    query, kv = (tuple(map(int, column)) for column in sizes.T)
    problem = AttentionProblem(
        q_tokens=sum(query),
        kv_tokens=sum(kv),
        q_heads=shards.q.shape[1],
        kv_heads=shards.k.shape[1],
        head_dim=shards.q.shape[2],
        v_head_dim=shards.v.shape[2],
        dtype=shards.dtype,
        causal=options.causal,
        scale=options.scale,  # type: ignore[arg-type]
    )
    return problem, Partition(
        query=_owners("query", query, options.order), kv=_owners("kv", kv, options.order)
    )


def _owners(side: str, sizes: Sequence[int], order: Order) -> tuple[tuple[Span, ...], ...]:
    """Tell the tokens of every rank from how many each holds."""
    if order == "contiguous":
        return tuple((Span(*ends),) for ends in pairwise(accumulate(sizes, initial=0)))
    owners = zigzag(sum(sizes), len(sizes))
    for rank, (size, spans) in enumerate(zip(sizes, owners, strict=True)):
        if size != token_count(spans):
            raise RejectedError(
                f"holds {size} {side} tokens; its zigzag share of {sum(sizes)} over {len(sizes)} "
                f"ranks is {token_count(spans)}",
                fix="hold the tokens that mdattn_mpi.shard_spans gives, or say order='contiguous'",
                rank=rank,
            )
    return owners


def _plan(
    device: Any, backend: str, problem: AttentionProblem, owners: Partition, options: _Options
) -> Plan:
    from mdattn_mpi.strategies import choose

    device.check(problem)
    ranks = device.ranks
    strategy, reasons = choose(
        problem, ranks, options.strategy, device.costs(), batch=False, owners=owners
    )
    lse = options.return_lse
    return Plan(problem, strategy, ranks, backend, lse, partition=owners, reasons=reasons)


def _attend(world: World, device: Any, plan: Plan, shards: _Shards) -> tuple[Any, Any]:
    """Collective. Run a plan; nobody starts computing before all have their buffers."""
    from mdattn_mpi.lockstep import Step
    from mdattn_mpi.strategies import STRATEGIES

    error = None
    try:
        q, k, v = (_adopt(device, array) for array in shards[:3])
        # No other item hides the gathering of this one.
        early = {"head_start": device.head_start(plan.problem)}
        options = early if plan.strategy == "allgather" else {}
        steps = STRATEGIES[plan.strategy](device, plan, q, k, v, **options)
        next(steps)
    except Exception as wrong:  # all ranks must hear of it
        error = MdattnError.wrap(wrong, rank=world.rank)
    world.agree(Step(0, "enqueue", plan.digest, plan.facts), error=error)
    try:
        next(steps)
    except StopIteration as end:
        out, lse = end.value
    return device.hand_over(out), device.hand_over(lse)


def _adopt(device: Any, array: Any) -> Any:
    adopted = device.adopt(array)
    if not getattr(adopted, "is_contiguous", True):
        raise RejectedError(
            f"an array of shape {tuple(array.shape)} on the GPU isn't contiguous",
            fix="copy it into one that is; only that can be sent",
        )
    return adopted


@dataclass
class _Session:
    """What stays between the calls on one communicator: a copy of it to talk over, and a GPU."""

    comm: Any
    world: World
    gpu: Backend | None = None
    left: bool = False

    @contextmanager
    def device(self, name: str) -> Iterator[Any]:
        """Collective. The device for one call; a GPU stays open for the next one."""
        from mdattn_mpi.backends import StrategyBackend, open_backend

        backend = (self.gpu if name == "cuda" else None) or open_backend(name, self.world)
        assert isinstance(backend, StrategyBackend)
        if name == "cuda":
            self.gpu = backend
        try:
            yield backend.device
        finally:
            if name == "cpu":
                backend.close()

    @contextmanager
    def left_on_error(self, device: Any) -> Iterator[None]:
        """Make no more use of what an error leaves behind.

        Messages may still be under way: they would mix with those of the next call, and write into
        their arrays. So these stay alive, and the next call starts another session.
        """
        try:
            yield
        except BaseException:
            device.abort()
            self.left = True
            _left.append((self, device))
            self.comm.Delete_attr(_key(self.comm))
            raise

    def end(self) -> None:
        """Collective. Called when the communicator is freed."""
        if not self.left:
            if self.gpu is not None:
                self.gpu.close()
            self.world.free()


_left: list[tuple[_Session, Any]] = []


def _session_of(comm: Any) -> _Session:
    """Collective on first use. The session that `comm` carries."""
    from mdattn_mpi.lockstep import World, board, launcher

    key = _key(comm)
    session: _Session | None = comm.Get_attr(key)
    if session is None:
        session = _Session(comm, World(comm.Dup(), launcher(), board()))
        comm.Set_attr(key, session)
    return session


_keys: dict[Any, int] = {}


def _key(comm: Any) -> int:
    """The key under which communicators carry a session; their duplicates don't inherit it."""

    def end(comm: Any, key: int, session: _Session) -> None:
        session.end()

    kind = type(comm)
    if kind not in _keys:
        _keys[kind] = kind.Create_keyval(delete_fn=end)
    return _keys[kind]
