"""`hierarchical` on real GPUs of one node, cut into nodes that aren't there, against `ring`.

    mpirun -n 2 --bind-to none python -m tests.gpu.nodes

prints, for each way of transfer, mask and size of a node, the norm of the difference over that of
the output.
"""

from __future__ import annotations

import sys

from mdattn_mpi.lockstep import World, start, watch

TOKENS, HEADS = 8199, (8, 2, 2)


def main() -> int:
    """Compare, on every rank."""
    with start() as world:
        for transfer in ("nccl", "copy"):
            compare(world, transfer)
    return 0


def compare(world: World, transfer: str) -> None:
    """Collective. Attend with both strategies over one way of transfer; rank 0 prints."""
    import ml_dtypes
    import numpy as np

    from mdattn_mpi.devices.cuda.open import open_cuda
    from mdattn_mpi.devices.protocol import run_to_end
    from mdattn_mpi.partition import partition_of
    from mdattn_mpi.problem import AttentionProblem, Plan
    from mdattn_mpi.strategies import STRATEGIES
    from tests.support.group import take

    device = open_cuda(world, transfer=transfer)
    random = np.random.default_rng(1)
    tensors = [
        random.standard_normal((TOKENS, heads, 128), np.float32).astype(ml_dtypes.bfloat16)
        for heads in HEADS
    ]
    for causal in ("none", "upper_left"):
        problem = AttentionProblem(TOKENS, TOKENS, 8, 2, 128, 128, "bfloat16", causal)

        def attend(plan: Plan) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            own = partition_of(plan).query[world.rank]
            shards = [device.upload(take(tensor, own)) for tensor in tensors]
            steps = STRATEGIES[plan.strategy](device, plan, *shards)
            next(steps)
            output, _ = device.download(*run_to_end(steps)).wait()
            return output.astype(np.float32)

        ring = attend(Plan(problem, "ring", world.size))
        for size in (1, world.size):
            found = attend(Plan(problem, "hierarchical", world.size, node_size=size))
            off = np.linalg.norm(found - ring) / np.linalg.norm(ring)
            if world.rank == 0:
                print(f"{transfer}, {causal}, nodes of {size}: {off:.1e}", flush=True)
    device.close()


if __name__ == "__main__":
    sys.exit(watch(main))
