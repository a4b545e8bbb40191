"""A whole group in this process: cut the inputs, attend on every rank, put the output together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.partition import partition_of
from mdattn_mpi.problem import Partition, Plan, Span
from mdattn_mpi.strategies import STRATEGIES
from tests.support.loopback import run_ranks

Array = NDArray[Any]


def take(array: Array, spans: Sequence[Span]) -> Array:
    """The shard of `array` that consists of `spans`."""
    return np.concatenate([array[:0], *(array[span.slice] for span in spans)])


def attend(device: Any, plan: Plan, *arrays: Array) -> tuple[Array, Array]:
    """Run a strategy on one rank from its start to its end."""
    steps = STRATEGIES[plan.strategy](device, plan, *arrays)
    next(steps)
    return run_to_end(steps)


def attend_in_group(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    *sinks: Array,
    held: Partition | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Output and LSE of the whole sequence; `held` says what ranks hold, if not the plan's."""
    owners = held or partition_of(plan)

    def run(device: Any) -> tuple[Array, Array]:
        own_q, own_k, own_v = (
            take(array, spans[device.rank])
            for array, spans in ((q, owners.query), (k, owners.kv), (v, owners.kv))
        )
        return attend(device, plan, own_q, own_k, own_v, *sinks)

    shards = run_ranks(plan.ranks, run, **options)
    out = np.full((*q.shape[:2], v.shape[2]), np.nan, q.dtype)
    lse = np.full(q.shape[:2], np.nan, np.float32)
    for spans, (out_shard, lse_shard) in zip(owners.query, shards, strict=True):
        start = 0
        for span in spans:
            out[span.slice] = out_shard[start : start + len(span)]
            lse[span.slice] = lse_shard[start : start + len(span)]
            start += len(span)
    return out, lse
