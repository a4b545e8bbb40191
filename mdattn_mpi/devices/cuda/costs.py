"""What attention and messages take on a GPU, in rough figures of the hardware."""

from __future__ import annotations

from mdattn_mpi.devices.protocol import Costs
from mdattn_mpi.problem import AttentionProblem

# Attention as cuDNN does it, per multiprocessor: H200 measured, the others scaled from data sheets.
FLOPS_PER_MULTIPROCESSOR = {8: 1.8e12, 9: 4.9e12, 10: 8e12, 12: 1.2e12}
TILE = 128  # query rows of one block of cuDNN's kernel
# Seconds of attention a rank that make a head start worth it: 8k lost 0.1 ms by one, 16k won 0.06.
HEAD_START = 5e-4


def of(sm_major: int, multiprocessors: int, everyone_near: bool, memory: int) -> Costs:
    """Rough figures of a GPU, for choosing a strategy.

    Parameters
    ----------
    sm_major, multiprocessors
        The kind of the GPU.
    everyone_near
        Whether copy engines reach all other ranks.
    memory
        Bytes that every rank has free.

    """
    return Costs(
        flops=FLOPS_PER_MULTIPROCESSOR.get(sm_major, 2e12) * multiprocessors,
        bandwidth=3.5e11 if everyone_near else 4e10,
        latency=1.2e-5 if everyone_near else 3e-5,
        merge=2e12,
        call=1e-5,
        memory=int(0.92 * memory),
    )


def head_start(problem: AttentionProblem, ranks: int, costs: Costs, multiprocessors: int) -> int:
    """Query rows whose attention to the rank's own keys takes as long as gathering the others.

    None if the item is so short that the host would be late with the two calls more.
    """
    if ranks == 1 or problem.flops / ranks / costs.flops < HEAD_START:
        return 0
    rows, keys = problem.q_tokens // ranks, problem.kv_tokens // ranks
    gather = 2 * costs.latency + (ranks - 1) / ranks * problem.kv_bytes / costs.bandwidth
    # cuDNN's kernel gives every multiprocessor a tile of rows of one head at a time. As many tiles
    # as there are multiprocessors take as long as one: whole waves, or time is lost.
    a_tile = 2 * TILE * keys * (problem.head_dim + problem.v_head_dim)
    wave = multiprocessors * a_tile / costs.flops
    waves = max(1, round(gather / wave))
    return min(waves * multiprocessors // problem.q_heads * TILE, rows)
