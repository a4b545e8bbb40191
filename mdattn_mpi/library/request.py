"""A call, or the making of an `Attention`, as all ranks agree on it; and the plan for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from mdattn_mpi.errors import MdattnError
from mdattn_mpi.library.arrays import Shards, shards_of, tokens_of
from mdattn_mpi.library.call import Call, begun_by_all, undone_on_error
from mdattn_mpi.library.options import Options
from mdattn_mpi.library.session import KEPT, Session, check_comm, session_of
from mdattn_mpi.library.spans import owners_of
from mdattn_mpi.problem import AttentionProblem, Partition, Plan, digest_of

SINKS = "values of the sinks (CRC-32)"  # what ranks differ in


class Request(NamedTuple):
    """A call, or the making of an `Attention`, as all ranks have agreed on it."""

    session: Session
    shards: Shards
    options: Options
    tokens: Sequence[tuple[int, int]]  # of query and of key and value, on each rank
    key: Any  # the same on all ranks; others have others
    call: Call | None = None  # begun by itself on all ranks


def agree_on(
    comm: Any,
    arrays: Sequence[Any],
    options: Options,
    deadline: float | None,
    begin: Callable[[Session, int, Shards], Call | None] = lambda *_: None,
) -> Request:
    """Collective. Check this rank's arguments, and that all ranks were called alike.

    `begin` may do before it whatever needs no other rank, and can be undone; the call that it
    returns is in the request, if all ranks have one.
    """
    check_comm(comm)
    from mdattn_mpi.lockstep.arrival import DEFAULT, call_deadline

    error: MdattnError | None = None
    shards, facts, digest, seconds = None, dict[str, Any](), 0, DEFAULT
    try:
        seconds = call_deadline(deadline)
        options = options.checked()
        shards = shards_of(*arrays)
        heads = tuple(shape[1:] for shape in shards.shapes)
        facts, digest = _compared(options, shards.dtype, shards.backend, heads)
    except Exception as wrong:  # all ranks must hear of it
        error = MdattnError.wrap(wrong)
    session = session_of(comm, seconds)
    sinks, call = 0, None
    if shards and not error:
        try:
            sinks = shards.sinks_crc32
            call = begin(session, digest, shards)
        except Exception as wrong:
            error = MdattnError.wrap(wrong)
    if error:
        error.rank = session.world.rank
    with session.left_if_alone(), undone_on_error(call):
        agreed = session.agree(
            "attention",
            lambda: {**facts, SINKS: sinks},
            digest ^ sinks,
            error=error,
            word=shards.tokens if shards else 0,
            stop=call is None,
        )
    call = begun_by_all(call, agreed)
    assert shards
    tokens = [tokens_of(number) for number in agreed.words]
    return Request(session, shards, options, tokens, (digest, agreed.words), call)


@lru_cache(KEPT)
def _compared(
    options: Options, dtype: str, backend: str, heads: tuple[tuple[int, ...], ...]
) -> tuple[dict[str, Any], int]:
    """What ranks compare of a call, and its digest: the same in all layers of a model."""
    facts = {
        **options._asdict(),
        "dtype": dtype,
        "backend": backend,
        "heads and head dims of q, k, v": heads,
    }
    return facts, digest_of(facts)


def plan_of(request: Request) -> Plan:
    """Collective where the device isn't open. Choose a strategy."""
    from mdattn_mpi.strategies import choose

    shards, options = request.shards, request.options
    query, kv = zip(*request.tokens, strict=True)
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
        window=options.window,
        softcap=options.softcap,
        sinks=options.sinks,
        segments=options.segments,
    )
    owners = Partition(
        query=owners_of("query", query, options.order), kv=owners_of("kv", kv, options.order)
    )
    ranks, lse = len(query), options.return_lse
    with request.session.device(shards.backend, options.kernel) as device:
        device.check(problem)
        costs = device.costs(problem)
        strategy, reasons = choose(
            problem, ranks, options.strategy, costs, batch=False, owners=owners
        )
    return Plan(
        problem,
        strategy,
        ranks,
        shards.backend,
        lse,
        partition=owners,
        node_size=costs.node_size,
        reasons=reasons,
    )
