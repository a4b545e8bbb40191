"""PyTorch's sides of ``mdattn bench attention -b cuda``, over the same inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import Span
from mdattn_mpi.problem import AttentionProblem

if TYPE_CHECKING:
    from mdattn_mpi.bench.inputs import Inputs
    from mdattn_mpi.devices.cuda.device import CudaDevice
    from mdattn_mpi.lockstep import World

FLEX = "PyTorch flex, one GPU"
THEIRS = ("PyTorch, all-gather", "PyTorch, all-to-all")


@dataclass
class Side:
    """One of the sides that are compared: ``run(n)`` gives the milliseconds of n calls."""

    name: str
    run: Callable[[int], list[float]]
    error: float = float("nan")
    times: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """The median call."""
        return median(self.times) if self.times else float("nan")


def flex_attention(problem: AttentionProblem, inputs: Inputs) -> list[Side]:
    """PyTorch's attention with any mask, compiled, on one GPU."""
    import torch
    from torch.nn.attention import flex_attention as flex

    (before, after), softcap = problem.window, problem.softcap

    def seen(batch: Any, head: Any, row: Any, key: Any) -> Any:
        found = key >= row - before if before >= 0 else key >= 0
        if problem.causal != "none":
            found = found & (key <= row)
        return found & (key <= row + after) if after >= 0 else found

    def cap(score: Any, *_: Any) -> Any:
        return softcap * torch.tanh(score / softcap)

    tokens = problem.q_tokens, problem.kv_tokens
    mask = flex.create_block_mask(seen, None, None, *tokens, device="cuda", _compile=True)
    attend = torch.compile(flex.flex_attention, dynamic=False)
    heads = [[array.transpose(0, 1)[None] for array in arrays] for arrays in inputs.sets]

    def call(number: int) -> Any:
        return attend(
            *heads[number % len(heads)],
            score_mod=cap if softcap else None,
            block_mask=mask,
            scale=problem.scale,
            enable_gqa=problem.group_heads > 1,
        )

    def run(calls: int) -> list[float]:
        marks = []
        for number in range(calls + 2):
            call(number)
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks[1:])]

    every = (Span(0, problem.q_tokens),)
    return [Side(FLEX, run, inputs.error(call(0)[0].transpose(0, 1), every, every))]


class Rivals:
    """PyTorch's context parallelism over the same ranks and GPUs."""

    def __init__(self, world: World, device: CudaDevice) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if world.size < 2:
            raise RejectedError("one rank", fix="start at least two, or give --no-rivals")
        place = f"{os.uname().nodename}:{29000 + world.job % 2000}".encode()
        address, _, port = world.bcast_bytes(place).decode().partition(":")
        torch.cuda.set_device(world.local_rank)
        store = dist.TCPStore(address, int(port), world.size, is_master=world.rank == 0)
        dist.init_process_group("nccl", store=store, rank=world.rank, world_size=world.size)
        self._mesh = init_device_mesh("cuda", (world.size,))
        self._world = world

    def sides(self, problem: AttentionProblem, inputs: Inputs) -> list[Side]:
        """Both ways in which it moves K and V."""
        heads = [
            [array.transpose(0, 1)[None].contiguous() for array in arrays] for arrays in inputs.sets
        ]
        ways = zip(THEIRS, ("allgather", "alltoall"), strict=True)
        return [Side(name, self._runner(problem, heads, way)) for name, way in ways]

    def close(self) -> None:
        """End PyTorch's process group."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def _runner(
        self, problem: AttentionProblem, heads: list[list[Any]], way: str
    ) -> Callable[[int], list[float]]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(calls: int) -> list[float]:
            with (
                self._shared(problem, heads, way) as shards,
                sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            ):
                marks = []
                for call in range(calls + 2):
                    q, k, v = shards[call % len(shards)]
                    torch.nn.functional.scaled_dot_product_attention(
                        q, k, v,
                        is_causal=problem.causal != "none",
                        scale=problem.scale,
                        enable_gqa=problem.group_heads > 1,
                    )  # fmt: skip
                    marks.append(torch.cuda.Event(enable_timing=True))
                    marks[-1].record()
                torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairwise(marks[1:])]

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
