"""PyTorch's context parallelism over a whole model, the same ranks and GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.rivals import torch_mesh

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World
    from mdattn_mpi.models.attention import Attending
    from mdattn_mpi.models.network import Network


class ContextParallel:
    """A model whose ids and positions PyTorch shares out, for one sequence.

    Collective: opens PyTorch's process group if it isn't.
    """

    def __init__(self, world: World, network: Network, ids: Any) -> None:
        import numpy as np
        import torch

        self.mesh = torch_mesh(world)
        self.network = network
        self.inputs = [
            torch.from_numpy(array)[None].to(network.device)
            for array in (ids, np.arange(len(ids), dtype=np.int64))
        ]

    def run(self, by: Attending) -> Any:
        """Collective. Run the model; `by` calls PyTorch's attention, which PyTorch shares."""
        import torch
        from torch.distributed.tensor.experimental import context_parallel

        from mdattn_mpi.models.attention import attending

        # A length must be a multiple of twice the ranks; what isn't cut here stays whole.
        shards = [each.clone() for each in self.inputs]
        with (
            torch.no_grad(),
            context_parallel(
                self.mesh,
                buffers=shards,
                buffer_seq_dims=[1, 1],
                no_restore_buffers=set(shards),
            ),
            attending(by),
        ):
            ids, positions = shards
            return self.network.backbone(input_ids=ids, position_ids=positions)[0]
