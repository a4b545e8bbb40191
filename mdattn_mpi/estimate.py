"""How long will this take, and how much memory? The one cost model; everybody else asks it.

It knows constants of the hardware and nothing that was measured just now, so that all ranks and a
resumed job come to the same answer. With F, B, L, M, C the `flops`, `bandwidth`, `latency`, `merge`
and `call` of `Costs`, for the busiest of P ranks::

    compute     its query–key pairs (`ring`, `allgather`: its tokens; `ulysses`: its heads) / F,
                and on a GPU what the kernel's last wave of tiles leaves idle
    ring        (P−1) · max(compute/P + C, hop) + compute/P + C + merge
                hop = L + K‖V shard / B;  merge = P partial results / M
    allgather   max(compute + C, gather) in a batch, else their sum
                gather = L + (P−1) · K‖V shard / B
                with a head start: compute + 3 · C + merge of its rows
                with a mask that hides keys: the gather is of what a rank sees of other shards, and
                `ring` takes max(compute + C, (P−1) · L + gather) + merge
    hierarchical   of n nodes: (n−1) · max(compute/n + C, hop, gather) + compute/n + C + merge,
                + gather outside a batch;  gather = L + a node's other K‖V shards / near B
    ulysses     max(compute + C, gather) in a batch, else their sum, + merge + the way back
                gather = L + Q, K, V of its heads from the others / B
                way back = L + output and LSE to the others / B;  merge = packing both ways / M

In a batch the transfers of an item run while the item before computes, and its files are read and
written meanwhile. No item that several GPUs share is faster than a host that asks for it: a launch
where the step is recorded and replayed (`devices.cuda.step`), else call by call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from mdattn_mpi.costs import Costs
from mdattn_mpi.mask import Mask
from mdattn_mpi.partition import busiest_share, head_shards, token_count
from mdattn_mpi.problem import (
    FLAT_STRATEGIES,
    STRATEGY_NAMES,
    AttentionProblem,
    Partition,
    StrategyName,
)
from mdattn_mpi.text import duration, memory_size

BATCH = 2  # items of a batch that a rank holds at a time: one computes, the next is on its way

# Seconds of a host that replays a step: 52 to 80 µs on two H200s (docs/performance.md). And where
# it asks call by call, for each rank of the group: 119 µs for attention and 71 to send and receive
# (docs/h200-kernels.json), `ring` both each time, `ulysses` two ways, `hierarchical` an attention
# for each node of 8.
REPLAYING = 7e-5
ASKING: dict[StrategyName, float] = {
    "ring": 1.9e-4,
    "allgather": 8e-5,
    "ulysses": 1.5e-4,
    "hierarchical": 9e-5,
}

TILE = 128  # query rows of one block of cuDNN's kernel
# Seconds of attention a rank that make a head start worth it: 8k lost 0.1 ms by one, 16k won 0.06.
HEAD_START = 5e-4


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
        """For example ``12.0 ms (compute 11.0 ms, exchange 58 µs, merge 1.0 ms), 3 GiB a rank``."""
        parts = ", ".join(
            f"{name} {duration(getattr(self, name))}" for name in ("compute", "exchange", "merge")
        )
        return f"{duration(self.seconds)} ({parts}), {memory_size(self.memory)} a rank"


def estimate(
    problem: AttentionProblem,
    ranks: int,
    strategy: StrategyName,
    costs: Costs,
    *,
    batch: bool,
    owners: Partition | None = None,
) -> Estimate:
    """Say what one strategy is expected to take.

    Parameters
    ----------
    batch
        Whether other items follow, so that transfers can run ahead.
    owners
        Who owns which tokens; None stands for even shares.

    """
    device = _of_device(problem, ranks, strategy, costs, batch, owners)
    return replace(device, seconds=max(device.seconds, host_seconds(strategy, ranks, costs)))


def host_seconds(strategy: StrategyName, ranks: int, costs: Costs) -> float:
    """Seconds that a GPU's host takes to ask for an item of a group."""
    if ranks == 1 or not costs.multiprocessors:
        return 0.0
    return REPLAYING if costs.replayed else ASKING[strategy] * ranks


def _of_device(
    problem: AttentionProblem,
    ranks: int,
    strategy: StrategyName,
    costs: Costs,
    batch: bool,
    owners: Partition | None,
) -> Estimate:
    """Work out the formulas of this module."""
    q_tokens, kv_tokens = _longest_shards(problem, ranks, owners)
    q_row = 2 * problem.q_heads * problem.head_dim
    kv_row = 2 * problem.kv_heads * (problem.head_dim + problem.v_head_dim)
    out_row = problem.q_heads * (2 * problem.v_head_dim + 4)
    partial_row = problem.q_heads * (4 * problem.v_head_dim + 8)
    shards = q_tokens * (q_row + out_row) + kv_tokens * kv_row
    held = BATCH if batch else 1
    tiles = -(-q_tokens // TILE) * problem.q_heads
    sparse = problem.mask.hides_keys
    foreign = min((ranks - 1) * kv_tokens, problem.mask.reach(problem.kv_tokens))

    if strategy == "ring":
        compute = _busiest_share(problem, ranks, owners) * problem.flops / costs.flops
        compute += _idle(problem, tiles * ranks, compute, costs)  # calls fill each other's ends
        hop = costs.latency + kv_tokens * kv_row / costs.bandwidth
        step = compute / ranks + costs.call
        merge = ranks * q_tokens * partial_row / costs.merge
        seconds, exchange = (ranks - 1) * max(step, hop) + step + merge, (ranks - 1) * hop
        if sparse:
            exchange = (ranks - 1) * costs.latency + foreign * kv_row / costs.bandwidth
            seconds = max(compute + costs.call, exchange) + merge
        partials = min(ranks, costs.partials) * q_tokens * partial_row
        buffers = min(2, ranks - 1) * min(kv_tokens, foreign) * kv_row
        return Estimate(seconds, compute, exchange, merge, held * (shards + buffers) + partials)

    if strategy == "hierarchical":
        nodes = ranks // costs.node_size
        compute = _busiest_share(problem, ranks, owners) * problem.flops / costs.flops
        compute += _idle(problem, tiles * nodes, compute, costs)
        hop = costs.latency + kv_tokens * kv_row / costs.bandwidth
        gather = costs.latency
        gather += (costs.node_size - 1) * kv_tokens * kv_row / costs.near_bandwidth
        step = compute / nodes + costs.call
        merge = nodes * q_tokens * partial_row / costs.merge if nodes > 1 else 0.0
        seconds = (nodes - 1) * max(step, hop, gather) + step + merge + (0 if batch else gather)
        partials = min(nodes, costs.partials) * q_tokens * partial_row
        step_bytes = (2 + costs.node_size) * kv_tokens * kv_row  # of an item ahead; else two
        exchange = (nodes - 1) * hop + nodes * gather
        memory = held * (shards + step_bytes) + step_bytes + partials
        return Estimate(seconds, compute, exchange, merge, memory)

    if strategy == "allgather":
        compute = _busiest_share(problem, ranks, owners) * problem.flops / costs.flops
        compute += _idle(problem, tiles, compute, costs)
        gather = costs.latency + foreign * kv_row / costs.bandwidth
        gathered = min(kv_tokens + foreign, problem.kv_tokens) * kv_row
        memory = held * (shards + gathered) + q_tokens * partial_row
        # Under a mask, the rows of a head start see few of their own rank's keys, or none.
        early = 0 if batch or problem.mask != Mask() else head_start(problem, ranks, costs)
        merge = 2 * early * partial_row / costs.merge
        calls = 3 if early else 1
        seconds = _overlapped(compute + calls * costs.call, gather, batch or early > 0) + merge
        return Estimate(seconds, compute, gather, merge, memory)

    q_share, kv_share = _largest_head_shares(problem.q_heads, problem.kv_heads, ranks)
    compute = q_share * problem.flops / costs.flops
    tiles = -(-problem.q_tokens // TILE) * round(q_share * problem.q_heads)
    compute += _idle(problem, tiles, compute, costs)
    inwards = int(problem.q_tokens * q_row * q_share + problem.kv_tokens * kv_row * kv_share)
    outwards = int(problem.q_tokens * out_row * q_share)
    others = (ranks - 1) / ranks
    gather = costs.latency + others * inwards / costs.bandwidth
    back = costs.latency + others * outwards / costs.bandwidth
    merge = (inwards + outwards) / costs.merge
    seconds = _overlapped(compute + costs.call, gather, batch) + merge + back
    partial = int(problem.q_tokens * partial_row * q_share)
    memory = held * (shards + 2 * inwards) + 2 * outwards + partial
    return Estimate(seconds, compute, gather + back, merge, memory)


def contenders(problem: AttentionProblem, ranks: int, costs: Costs) -> tuple[StrategyName, ...]:
    """Strategies that are worth an estimate: `hierarchical` on several nodes, without a window."""
    nodes = costs.node_size > 1 and ranks > costs.node_size and not ranks % costs.node_size
    return STRATEGY_NAMES if nodes and not problem.mask.hides_keys else FLAT_STRATEGIES


def item_seconds(problem: AttentionProblem, ranks: int, costs: Costs) -> float:
    """Estimate an item of a batch by its fastest strategy that fits, its files included.

    What the first item of a shape takes besides isn't in it: `Costs.preparing`.
    """
    names = contenders(problem, ranks, costs)
    every = [estimate(problem, ranks, name, costs, batch=True) for name in names]
    fitting = [each for each in every if not costs.memory or each.memory <= costs.memory]
    attention = min(each.seconds for each in fitting or every)
    written = output_bytes(problem)
    return costs.item + beside_files(attention, input_bytes(problem), written, ranks, costs)


def beside_files(computing: float, read: int, written: int, ranks: int, costs: Costs) -> float:
    """Seconds of an item whose ranks read and write so many bytes while others compute.

    A GPU computes meanwhile; on a CPU rank the same cores do it all.
    """
    reading, writing = read / ranks / costs.reading, written / ranks / costs.writing
    if costs.multiprocessors:
        return max(computing, reading, writing)
    return computing + reading + writing


def input_bytes(problem: AttentionProblem) -> int:
    """Bytes of an item's Q, K and V."""
    return problem.kv_bytes + 2 * problem.q_tokens * problem.q_heads * problem.head_dim


def output_bytes(problem: AttentionProblem) -> int:
    """Bytes of an item's output, without LSE."""
    return 2 * problem.q_tokens * problem.q_heads * problem.v_head_dim


def least_memory(problem: AttentionProblem, ranks: int, costs: Costs) -> int:
    """Bytes a rank that the most frugal strategy takes, in a batch."""
    names = contenders(problem, ranks, costs)
    return min(estimate(problem, ranks, name, costs, batch=True).memory for name in names)


def least_ranks(problem: AttentionProblem, costs: Costs) -> int | None:
    """Find the smallest group whose ranks can hold an item of a batch; None if there is none."""
    most = max(problem.q_tokens, problem.kv_tokens)
    return enough_ranks(lambda ranks: least_memory(problem, ranks, costs), most, costs.memory)


def enough_ranks(memory: Callable[[int], int], most: int, limit: int) -> int | None:
    """Find the smallest number of ranks, up to `most`, that need no more than `limit` bytes each.

    `memory` says how many they need; a `limit` of 0 means any. None if there is none.
    """
    if not limit:
        return 1
    if memory(most) > limit:
        return None
    at_least = ceil(memory(1) / limit)  # they divide it, at best
    return next((n for n in range(at_least, most + 1) if memory(n) <= limit), None)


def head_start(problem: AttentionProblem, ranks: int, costs: Costs) -> int:
    """Query rows whose attention to a GPU's own keys takes as long as gathering the others.

    For an item that nothing else hides the transfer of; see `strategies.allgather`. 0 if it is
    so short that asking for two calls more would take longer than they save, and on a CPU.
    """
    multiprocessors = costs.multiprocessors
    if ranks == 1 or not multiprocessors or problem.mask.hides_keys:
        return 0
    if problem.flops / ranks / costs.flops < HEAD_START:
        return 0
    rows, keys = problem.q_tokens // ranks, problem.kv_tokens // ranks
    gather = 2 * costs.latency + (ranks - 1) / ranks * problem.kv_bytes / costs.bandwidth
    # cuDNN's kernel gives every multiprocessor a tile of rows of one head at a time. As many
    # tiles as there are multiprocessors take as long as one: whole waves, or time is lost.
    a_tile = 2 * TILE * keys * (problem.head_dim + problem.v_head_dim)
    wave = multiprocessors * a_tile / costs.flops
    waves = max(1, round(gather / wave))
    return min(waves * multiprocessors // problem.q_heads * TILE, rows)


def _longest_shards(
    problem: AttentionProblem, ranks: int, owners: Partition | None
) -> tuple[int, int]:
    """Tokens of the longest shard of the query, and of K and V."""
    if owners is None:
        return -(-problem.q_tokens // ranks), -(-problem.kv_tokens // ranks)
    return max(map(token_count, owners.query)), max(map(token_count, owners.kv))


def _busiest_share(problem: AttentionProblem, ranks: int, owners: Partition | None) -> float:
    """Return the share of all query–key pairs that the busiest rank computes for its tokens."""
    if owners is None or problem.mask == Mask():
        return _longest_shards(problem, ranks, owners)[0] / problem.q_tokens
    return busiest_share(problem, owners.query)


@lru_cache
def _largest_head_shares(q_heads: int, kv_heads: int, ranks: int) -> tuple[float, float]:
    """Return the largest shares of the query heads, and of the kv heads, that a rank attends to."""
    shards = head_shards(q_heads, kv_heads, min(ranks, q_heads))  # nobody gets less than a head
    return max(len(s.q) for s in shards) / q_heads, max(len(s.kv) for s in shards) / kv_heads


def _idle(problem: AttentionProblem, tiles: int, compute: float, costs: Costs) -> float:
    """Seconds that multiprocessors wait for the last of `tiles`, all of which take `compute`.

    Without a mask, when all tiles are alike; else the longest go first, and short ones fill up.
    """
    if not costs.multiprocessors or problem.mask != Mask():
        return 0.0
    waves = tiles / costs.multiprocessors
    return (ceil(waves) - waves) * compute / waves


def _overlapped(compute: float, exchange: float, batch: bool) -> float:
    return max(compute, exchange) if batch else compute + exchange
