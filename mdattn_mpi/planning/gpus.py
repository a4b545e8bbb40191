"""GPUs by name, for a job that is planned where there is none of them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from mdattn_mpi.costs import Costs, gpu_costs

GB = 10**9
PCIE = 50e9  # bytes/s each way, of the fourth generation and about
PEAK = 0.78  # of a link's data sheet figure, by copy engines: 355 GB/s of 450 on two H200s
# Attention's speed at smaller head dims, over that at 128: cuDNN and FlashAttention on an H100.
SMALL_HEADS, SMALL = 64, 0.75


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes
    ----------
    sm
        Compute capability.
    memory
        Bytes.
    link
        Bytes/s to the other GPUs of its node, each way.
    measured
        Whether this program has been timed on it.

    """

    name: str
    sm: tuple[int, int]
    multiprocessors: int
    memory: int
    link: float
    measured: bool

    def costs(self, *, near: bool, memory: int, preparing: float) -> Costs:
        """Say what a rank with such a GPU costs; `near` where its group is within a node."""
        costs = gpu_costs(
            self.sm[0], self.multiprocessors, near=near, memory=memory, preparing=preparing
        )
        return replace(costs, bandwidth=PEAK * self.link) if near else costs


# Multiprocessors, memory and NVLink from NVIDIA's data sheets of the A100 80GB, H100, H200 (SXM)
# and the DGX B200, and its whitepapers on the Ampere, Hopper and Blackwell architectures.
GPUS = {
    "a100": Gpu("A100 SXM 80GB", (8, 0), 108, 80 * GB, 300e9, False),
    "h100": Gpu("H100 SXM", (9, 0), 132, 80 * GB, 450e9, True),
    "h200": Gpu("H200 SXM", (9, 0), 132, 141 * GB, 450e9, True),
    "b200": Gpu("B200 SXM", (10, 0), 148, 180 * GB, 900e9, False),
}


def like(name: str, sm: tuple[int, int], multiprocessors: int, memory: int) -> Gpu:
    """Describe a GPU that was found: its links are those of its generation, which it may not have.

    Only those of Hopper have been timed.
    """
    link = next((gpu.link for gpu in GPUS.values() if gpu.sm[0] == sm[0]), PCIE)
    return Gpu(name, sm, multiprocessors, memory, link, sm[0] == 9)


def speed_at(head_dim: int) -> float:
    """Attention's speed with heads of this dim over that with 128."""
    return SMALL if head_dim <= SMALL_HEADS else 1.0
