"""How fast devices are: the constants that `mdattn_mpi.estimate` reckons with, and nothing else.

They are of the hardware, never what was measured just now, so that all ranks and a resumed job come
to the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass

# Attention as cuDNN does it, per multiprocessor and by the major number of the SM architecture:
# SM 9 measured on an H200, the others scaled from data sheets.
FLOPS_PER_MULTIPROCESSOR = {8: 1.8e12, 9: 4.9e12, 10: 8e12, 12: 1.2e12}
FLOPS_PER_CORE = 6e10  # of a server's processor
# A model's layers beside attention, over cuDNN's attention: an 8B's on two H200s, 16k to 1M tokens
# (docs/performance.md, whole models). And on a core, whose 16-bit products PyTorch does faster.
DENSE, DENSE_PER_CORE = 0.8, 1.2e11

# Bytes/s of one rank from and to files in memory, a look at every number and checksums included:
# 16 items of 64k tokens on two ranks, beside H200s (docs/performance.md, the whole job).
READING, WRITING = 3.7e9, 1.4e9
NEAR_BANDWIDTH = 3.5e11  # bytes/s between GPUs that reach each other by peer copies
PREPARING = 0.04  # seconds of an execution plan of cuDNN, which FlashAttention does without
PARTIALS = 4  # of a GPU: one in which all are folded, two that wait for it, one under way


@dataclass(frozen=True)
class Costs:
    """How fast one rank's device is; rough figures, whose ratios matter most.

    Parameters
    ----------
    flops
        Attention, FLOP/s.
    bandwidth
        Bytes/s that a rank sends while it receives as much; between nodes, if there are several.
    latency
        Seconds before the first byte of an exchange arrives.
    merge
        Bytes/s of partial results that are merged, or of heads that are packed.
    call
        Seconds that one call of the kernel takes however small it is.
    item
        Seconds that an item of a batch takes besides: agreements, opening, closing.
    preparing
        Seconds that the first item of a shape takes besides, on every rank that computes it.
    memory
        Bytes that a rank may use for arrays, the smallest over the group; 0 where unknown.
    partials
        Partial results in float32 that `ring` holds of a row at a time, if there are as many ranks.
    exact_merge
        Whether what is merged is as exact as what one call gives: then the fastest strategy is
        taken, however much it merges.
    multiprocessors
        Tiles of rows that a GPU's kernel works on at a time; 0 where it isn't done by tiles.
    reading, writing
        Bytes/s of a rank's files.
    dense
        A model's layers beside attention, FLOP/s; 0 where they are as fast.
    node_size
        Ranks of a node, where the group is several nodes of as many ranks, node after node; else 1.
    near_bandwidth
        The same as `bandwidth` within a node, where `node_size` is above 1.
    replayed
        Whether steps of a GPU are recorded and replayed.

    """

    flops: float
    bandwidth: float
    latency: float
    merge: float
    call: float
    item: float = 0.0
    preparing: float = 0.0
    memory: int = 0
    partials: int = 1
    exact_merge: bool = False
    multiprocessors: int = 0
    reading: float = READING
    writing: float = WRITING
    dense: float = 0.0
    node_size: int = 1
    near_bandwidth: float = NEAR_BANDWIDTH
    replayed: bool = False


def gpu_costs(
    sm_major: int,
    multiprocessors: int,
    *,
    near: bool = True,
    node_size: int = 1,
    memory: int = 0,
    preparing: float = PREPARING,
    exact_merge: bool = False,
) -> Costs:
    """Costs of a GPU; `near` where all GPUs of its group reach each other by peer copies."""
    flops = FLOPS_PER_MULTIPROCESSOR.get(sm_major, 2e12) * multiprocessors
    return Costs(
        flops=flops,
        bandwidth=NEAR_BANDWIDTH if near else 4e10,
        latency=1.2e-5 if near else 3e-5,
        merge=2e12,
        call=1e-5,
        item=2e-4,
        preparing=preparing,
        memory=memory,
        partials=PARTIALS,
        exact_merge=exact_merge,
        multiprocessors=multiprocessors,
        dense=DENSE * flops,
        node_size=node_size,
        replayed=near,
    )


def cpu_costs(memory: int = 0, node_size: int = 1) -> Costs:
    """Costs of a rank of one thread, whose messages go through shared memory."""
    return Costs(
        flops=FLOPS_PER_CORE,
        dense=DENSE_PER_CORE,
        bandwidth=4e9,
        latency=20e-6,
        merge=4e9,
        call=50e-6,
        item=2e-3,
        memory=memory,
        node_size=node_size,
        near_bandwidth=4e9,
    )


def typical_costs(backend: str, memory: int = 0, *, preparing: float = PREPARING) -> Costs:
    """Costs of a backend whose devices aren't open yet: an H100 or H200, or a core."""
    return (
        cpu_costs(memory)
        if backend == "cpu"
        else gpu_costs(9, 132, memory=memory, preparing=preparing)
    )
