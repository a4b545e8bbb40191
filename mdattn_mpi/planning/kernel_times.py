"""A file of measured times of the attention kernel, which a plan is made more exact by.

``mdattn bench kernels --json`` prints one, ``mdattn bench predict --kernels`` keeps one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import log
from pathlib import Path
from typing import Any, NamedTuple

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import FULL, LOWER_RIGHT, Band
from mdattn_mpi.problem import AttentionProblem

SIDES = {"cudnn": ("cuDNN",), "flash": ("flash, float32", "flash")}  # as `bench kernels` names them
_MADE_BY = "make one on such a GPU: mdattn bench kernels --json > FILE"


class KernelTime(NamedTuple):
    """One measured call, and the FLOP/s it came to."""

    q_tokens: int
    kv_tokens: int
    head_dim: int
    band: Band
    flops: float

    def distance(self, problem: AttentionProblem, ranks: int) -> tuple[bool, bool, float]:
        """How unlike it is to the calls that a rank makes for an item."""
        return (
            self.head_dim != problem.head_dim,
            (self.band == FULL) != (problem.causal == "none"),
            abs(log(self.q_tokens * ranks / problem.q_tokens))
            + abs(log(self.kv_tokens / problem.kv_tokens)),
        )


class KernelTimes:
    """Measured calls of one kind of GPU; the nearest one tells how fast an item is."""

    def __init__(self, calls: list[KernelTime]) -> None:
        self.calls = calls

    def flops(self, problem: AttentionProblem, ranks: int) -> float:
        """FLOP/s of the call that is most like those of an item."""
        return min(self.calls, key=lambda call: call.distance(problem, ranks)).flops


def read_kernel_times(path: str, kernel: str) -> KernelTimes:
    """Read a file of either benchmark; of several kernels the times of `kernel`.

    Raises
    ------
    RejectedError
        It can't be read, or holds no times.

    """
    try:
        found = json.loads(Path(path).read_bytes())
        calls = [*_of_kernels(found, kernel), *_of_predict(found)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RejectedError(
            f"no file of kernel times ({type(error).__name__}: {error})",
            fix=_MADE_BY,
            file=path,
        ) from None
    if not calls:
        raise RejectedError(
            f"holds no times of {kernel}",
            fix=_MADE_BY,
            file=path,
        )
    return KernelTimes(calls)


def _of_kernels(found: Mapping[str, Any], kernel: str) -> Iterator[KernelTime]:
    """Read what ``mdattn bench kernels --json`` has printed."""
    for result in found.get("results", ()):
        call, sides = result["call"], result["sides"]
        side = next((sides[name] for name in SIDES[kernel] if name in sides), None)
        if side:
            yield KernelTime(
                int(call["q_tokens"]),
                int(call["kv_tokens"]),
                int(call["head_dim"]),
                Band(*call["band"]),
                1e12 * float(side["TFLOP/s"]),
            )


def _of_predict(found: Mapping[str, Any]) -> Iterator[KernelTime]:
    """Read what ``mdattn bench predict`` keeps."""
    for each in found.get("attend", ()):
        q, kv, heads, _, head_dim, v_head_dim, mask = each["call"]
        band = Band(*mask) if isinstance(mask, list) else LOWER_RIGHT if mask else FULL
        flops = 2 * band.pairs(q, kv) * heads * (head_dim + v_head_dim)
        yield KernelTime(q, kv, head_dim, band, flops / each["seconds"])
