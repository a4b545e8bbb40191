"""Random inputs of ``mdattn bench attention -b cuda``, and what is right for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mdattn_mpi.mask import Span
from mdattn_mpi.partition import partition_of
from mdattn_mpi.problem import AttentionProblem, Plan
from mdattn_mpi.verifier.visible import visible

SETS = 3  # inputs that rotate
ROWS = 32  # of a rank's query that are compared with float64
Shards = tuple[Any, Any, Any]


class Inputs:
    """Random inputs, the same on all ranks, and what is right for some of their rows."""

    def __init__(self, problem: AttentionProblem, seed: int) -> None:
        import torch

        self.problem = problem
        torch.manual_seed(seed)
        dtype = getattr(torch, problem.dtype)
        q = (problem.q_tokens, problem.q_heads, problem.head_dim)
        k = (problem.kv_tokens, problem.kv_heads, problem.head_dim)
        v = (problem.kv_tokens, problem.kv_heads, problem.v_head_dim)
        self.sets = [
            tuple(torch.randn(*shape, device="cuda", dtype=dtype) for shape in (q, k, v))
            for _ in range(SETS if problem.q_tokens <= 1 << 17 else 1)
        ]

    def shards(self, plan: Plan, rank: int) -> list[Shards]:
        """The shards of a rank, by PyTorch, one a set."""
        import torch

        owners = partition_of(plan)
        spans = (owners.query[rank], owners.kv[rank], owners.kv[rank])
        return [
            tuple(
                torch.cat([array[span.slice] for span in own]).contiguous()
                for array, own in zip(arrays, spans, strict=True)
            )
            for arrays in self.sets
        ]

    def error(self, output: Any, spans: Sequence[Span], among: Sequence[Span]) -> float:
        """Mean of ‖output − right‖ / ‖right‖ over some rows of set 0.

        `output` holds the rows of `spans`; those that are looked at are among the rows of `among`.
        """
        import torch

        q, k, v = self.sets[0]
        tokens, wanted = (
            torch.cat([torch.arange(span.start, span.stop) for span in some])
            for some in (spans, among)
        )
        rows = wanted[torch.linspace(0, len(wanted) - 1, ROWS).long()]
        local = torch.stack([(tokens == row).nonzero()[0, 0] for row in rows]).to(output.device)
        seen = visible(self.problem, rows.numpy())
        first, last = (torch.from_numpy(end).to(q.device)[:, None] for end in seen)
        keys = torch.arange(len(k), device=q.device)
        rows, group = rows.to(q.device), self.problem.group_heads
        errors = []
        for head in range(self.problem.q_heads):
            scores = q[rows, head].double() @ k[:, head // group].double().T * self.problem.scale
            if softcap := self.problem.softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores[(keys < first) | (keys > last)] = -torch.inf
            right = scores.softmax(-1) @ v[:, head // group].double()
            wrong = output[local, head].double() - right
            errors.append((wrong.norm(dim=-1) / right.norm(dim=-1)).mean())
        return float(torch.stack(errors).mean())
