"""How fast a core of this machine multiplies matrices, in a fraction of a second."""

from __future__ import annotations

from time import perf_counter, process_time

from mdattn_mpi.models import check_installed
from mdattn_mpi.problem import DTypeName

TOKENS = 1024
SECONDS = 0.2


def core_dense_flops(width: int, dtype: DTypeName) -> float:
    """FLOP/s of one core, of tokens by square weights of a model's `width`; by processor time.

    Raises
    ------
    RejectedError
        PyTorch isn't installed.

    """
    check_installed()
    import torch

    torch.set_num_threads(1)
    tokens = torch.randn(TOKENS, width, dtype=getattr(torch, dtype))
    weights = torch.randn(width, width, dtype=tokens.dtype)
    torch.nn.functional.linear(tokens, weights)
    calls, began, until = 0, process_time(), perf_counter() + SECONDS
    while not calls or perf_counter() < until:
        torch.nn.functional.linear(tokens, weights)
        calls += 1
    return 2 * TOKENS * width**2 * calls / max(process_time() - began, 1e-9)
