"""PyTorch beside us on the same GPUs, for `mdattn bench attention -b cuda`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import World

THEIRS = ("PyTorch, all-gather", "PyTorch, all-to-all")
FLEX = "PyTorch flex_attention, one GPU"

Runner = Callable[[int], list[float]]  # so many calls: milliseconds of each


def torch_mesh(world: World) -> Any:
    """Collective. Open PyTorch's process group, if it isn't; return a mesh of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        place = f"{os.uname().nodename}:{29000 + world.job % 2000}".encode()
        address, _, port = world.bcast_bytes(place).decode().partition(":")
        torch.cuda.set_device(world.local_rank)
        store = dist.TCPStore(address, int(port), world.size, is_master=world.rank == 0)
        dist.init_process_group("nccl", store=store, rank=world.rank, world_size=world.size)
    return init_device_mesh("cuda", (world.size,))


def _timed(call: Callable[..., None], sets: Sequence[Sequence[Any]], calls: int) -> list[float]:
    """Milliseconds of each of so many calls, the arrays in turn; two more come before them."""
    import torch

    marks = []
    for number in range(calls + 2):
        call(*sets[number % len(sets)])
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks[1:])]


class Rivals:
    """PyTorch's context parallelism over the same ranks and GPUs; without it, its one kernel."""

    def __init__(self, world: World) -> None:
        if world.size < 2:
            raise RejectedError("one rank", fix="start at least two, or give --no-rivals")
        self._mesh = torch_mesh(world)
        self._world = world

    def runners(
        self, problem: AttentionProblem, inputs: Sequence[Sequence[Any]]
    ) -> dict[str, Runner]:
        """Both ways in which it moves K and V; it has none for windows, but a kernel."""
        heads = [
            [array.transpose(0, 1)[None].contiguous() for array in arrays] for arrays in inputs
        ]
        if problem.mask.low is not None:
            return {FLEX: self._flex(problem, heads)}
        ways = zip(THEIRS, ("allgather", "alltoall"), strict=True)
        return {name: self._runner(problem, heads, way) for name, way in ways}

    def close(self) -> None:
        """End PyTorch's process group."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def _flex(self, problem: AttentionProblem, heads: list[list[Any]]) -> Runner:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        low, high = problem.mask.low or 0, problem.mask.high
        high = problem.kv_tokens if high is None else high

        def seen(batch: Any, head: Any, i: Any, j: Any) -> Any:
            return (j - i >= low) & (j - i <= high)

        sizes = problem.q_tokens, problem.kv_tokens
        mask = create_block_mask(seen, None, None, *sizes, device="cuda", _compile=True)
        attend = torch.compile(flex_attention)

        def call(q: Any, k: Any, v: Any) -> None:
            attend(
                q, k, v, block_mask=mask, scale=problem.scale, enable_gqa=problem.group_heads > 1
            )  # fmt: skip

        return partial(_timed, call, heads)

    def _runner(self, problem: AttentionProblem, heads: list[list[Any]], way: str) -> Runner:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def call(q: Any, k: Any, v: Any) -> None:
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v,
                is_causal=problem.causal != "none",
                scale=problem.scale,
                enable_gqa=problem.group_heads > 1,
            )  # fmt: skip

        def run(calls: int) -> list[float]:
            with (
                self._shared(problem, heads, way) as shards,
                sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            ):
                return _timed(call, shards, calls)

        return run

    @contextmanager
    def _shared(
        self, problem: AttentionProblem, heads: list[list[Any]], way: str
    ) -> Iterator[list[list[Any]]]:
        """Inside, the shards of this rank and PyTorch's attention over all ranks."""
        import torch
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._context_parallel import (
            _cp_options,
            set_rotate_method,
        )

        set_rotate_method(way)
        _cp_options.enable_load_balance = problem.causal != "none"  # refused without a mask
        with torch.no_grad():
            shards = [[array.clone() for array in arrays] for arrays in heads]
            flat = [array for arrays in shards for array in arrays]
            with context_parallel(
                self._mesh,
                buffers=flat,
                buffer_seq_dims=[2] * len(flat),
                no_restore_buffers=set(flat),
            ):
                yield shards
