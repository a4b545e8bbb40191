"""``-s auto``: which strategy fits a problem, a group and a device, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mdattn_mpi.devices.protocol import Costs
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.partition import head_shards, partition, token_count
from mdattn_mpi.problem import AttentionProblem, Partition, StrategyName, seen_pairs

TIE = 1.05  # the less a strategy merges the more exact it is: worth this much time


@dataclass(frozen=True)
class Estimate:
    """What a strategy is expected to take of the busiest rank.

    `seconds` is for the item as a whole; `compute`, `exchange` and `merge` are its parts, hidden
    or not. `memory` counts the bytes of all arrays.
    """

    seconds: float
    compute: float
    exchange: float
    merge: float
    memory: int

    def __str__(self) -> str:
        """For example ``1.2e-02 s (compute 1.1e-02, exchange 4e-03, merge 1e-03), 0.3 GiB``."""
        return (
            f"{self.seconds:.2g} s (compute {self.compute:.2g}, exchange {self.exchange:.2g}, "
            f"merge {self.merge:.2g}), {self.memory / 2**30:.2g} GiB a rank"
        )


def choose(
    problem: AttentionProblem,
    ranks: int,
    strategy: Literal["auto"] | StrategyName,
    costs: Costs,
    *,
    batch: bool = True,
    owners: Partition | None = None,
) -> tuple[StrategyName, tuple[str, ...]]:
    """Pick the fastest strategy that fits into memory; near ties go to the one that merges least.

    The estimate, with F, B, L, M, C the `flops`, `bandwidth`, `latency`, `merge` and `call` of
    `costs`, for the busiest of P ranks::

        compute     its query–key pairs (`ring`, `allgather`: its tokens; `ulysses`: its heads) / F
        ring        (P−1) · max(compute/P + C, hop) + compute/P + C + merge
                    hop = L + K‖V shard / B;  merge = P partial results / M
        allgather   max(compute + C, gather) in a batch, else their sum
                    gather = L + (P−1) · K‖V shard / B
        ulysses     max(compute + C, gather) in a batch, else their sum, + merge + the way back
                    gather = L + Q, K, V of its heads from the others / B
                    way back = L + output and LSE to the others / B;  merge = packing both ways / M

    In a batch the transfers of an item run while the item before computes.

    Parameters
    ----------
    strategy
        What the user asked for; any other than ``auto`` is only checked.
    batch
        Whether other items follow, so that transfers can run ahead.
    owners
        Who owns which tokens, if that is given; None leaves it to the strategy.

    Returns
    -------
    tuple
        The strategy, and the reasons as sentences to print.

    Raises
    ------
    RejectedError
        No strategy, or not the one asked for, fits into `costs.memory`.

    """
    names: tuple[StrategyName, ...] = get_args(StrategyName)
    if strategy not in ("auto", *names):
        raise RejectedError(f"strategy {strategy!r}", fix=f"use auto, {', '.join(names)}")
    estimates = {
        name: estimate(problem, ranks, name, costs, batch=batch, owners=owners) for name in names
    }
    fitting = {
        name: found
        for name, found in estimates.items()
        if not costs.memory or found.memory <= costs.memory
    }
    wanted = names if strategy == "auto" else (strategy,)
    if not any(name in fitting for name in wanted):
        raise _too_large(problem, wanted, estimates, fitting, costs.memory)
    if strategy != "auto":
        return strategy, (f"{strategy}: asked for; {estimates[strategy]}",)
    if ranks == 1:
        return "ring", ("ring: one rank, nothing to exchange",)
    best = min(found.seconds for found in fitting.values())
    least_merged: tuple[StrategyName, ...] = ("allgather", "ulysses", "ring")
    chosen = next(n for n in least_merged if n in fitting and fitting[n].seconds <= TIE * best)
    ordered = sorted(names, key=lambda name: (name != chosen, estimates[name].seconds))
    return chosen, tuple(
        f"{name}: {'chosen; ' if name == chosen else ''}"
        f"{'does not fit; ' if name not in fitting else ''}estimated {estimates[name]}"
        for name in ordered
    )


def estimate(
    problem: AttentionProblem,
    ranks: int,
    strategy: StrategyName,
    costs: Costs,
    *,
    batch: bool,
    owners: Partition | None = None,
) -> Estimate:
    """Work out the formulas of `choose` for one strategy."""
    owners = owners or partition(problem, strategy, ranks)
    q_tokens, kv_tokens = (max(map(token_count, side)) for side in (owners.query, owners.kv))
    q_row = 2 * problem.q_heads * problem.head_dim
    kv_row = 2 * problem.kv_heads * (problem.head_dim + problem.v_head_dim)
    out_row = problem.q_heads * (2 * problem.v_head_dim + 4)
    partial_row = problem.q_heads * (4 * problem.v_head_dim + 8)
    shards = q_tokens * (q_row + out_row) + kv_tokens * kv_row
    ahead = 2 if batch else 1  # items whose inputs are held at a time
    others = (ranks - 1) / ranks
    compute = _busiest_share(problem, strategy, owners) * problem.flops / costs.flops

    if strategy == "ring":
        hop = costs.latency + kv_tokens * kv_row / costs.bandwidth
        step = compute / ranks + costs.call
        merge = ranks * q_tokens * partial_row / costs.merge
        seconds = (ranks - 1) * max(step, hop) + step + merge
        memory = ahead * (shards + min(2, ranks - 1) * kv_tokens * kv_row) + q_tokens * partial_row
        return Estimate(seconds, compute, (ranks - 1) * hop, merge, memory)

    if strategy == "allgather":
        gather = costs.latency + (ranks - 1) * kv_tokens * kv_row / costs.bandwidth
        memory = ahead * (shards + problem.kv_bytes) + q_tokens * partial_row
        return Estimate(
            _overlapped(compute + costs.call, gather, batch), compute, gather, 0.0, memory
        )

    heads = head_shards(problem.q_heads, problem.kv_heads, ranks)
    q_share = max(len(shard.q) for shard in heads) / problem.q_heads
    kv_share = max(len(shard.kv) for shard in heads) / problem.kv_heads
    inwards = int(problem.q_tokens * q_row * q_share + problem.kv_tokens * kv_row * kv_share)
    outwards = int(problem.q_tokens * out_row * q_share)
    gather = costs.latency + others * inwards / costs.bandwidth
    back = costs.latency + others * outwards / costs.bandwidth
    merge = (inwards + outwards) / costs.merge
    seconds = _overlapped(compute + costs.call, gather, batch) + merge + back
    partial = int(problem.q_tokens * partial_row * q_share)
    memory = ahead * (shards + 2 * inwards) + 2 * outwards + partial
    return Estimate(seconds, compute, gather + back, merge, memory)


def _busiest_share(problem: AttentionProblem, strategy: StrategyName, owners: Partition) -> float:
    """Return the share of all query–key pairs that the busiest rank computes."""
    if strategy == "ulysses":
        heads = head_shards(problem.q_heads, problem.kv_heads, len(owners.query))
        return max(len(shard.q) for shard in heads) / problem.q_heads
    diagonal = problem.diagonal
    if diagonal is None:
        return max(map(token_count, owners.query)) / problem.q_tokens
    pairs = (
        sum(seen_pairs(len(span), problem.kv_tokens, span.start + diagonal) for span in spans)
        for spans in owners.query
    )
    return max(pairs) / max(1, problem.pairs)


def _overlapped(compute: float, exchange: float, batch: bool) -> float:
    return max(compute, exchange) if batch else compute + exchange


def _too_large(
    problem: AttentionProblem,
    wanted: tuple[StrategyName, ...],
    estimates: dict[StrategyName, Estimate],
    fitting: dict[StrategyName, Estimate],
    memory: int,
) -> RejectedError:
    least = min(wanted, key=lambda name: estimates[name].memory)
    return RejectedError(
        f"{problem} takes {estimates[least].memory / 2**30:.3g} GiB a rank with {least}, "
        f"of {memory / 2**30:.3g} GiB",
        fix=f"use -s {next(iter(fitting))}, which fits" if fitting else "use more ranks",
    )
