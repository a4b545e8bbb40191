"""The merge of partial results: one kernel, in float32, each partial weighted once.

A partial holds the attention of some rows to some keys, already divided by its own softmax
denominator, and that denominator's logarithm. With ``L`` the greatest of them, ::

    lse    = L + log1p(sum of exp(lse_i - L), the greatest left out)
    output = sum of exp(lse_i - lse) · output_i

A partial of no keys has LSE −∞ and weighs nothing; a row of none gives 0 and −∞. A sink is one more
partial, whose output is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TEMPLATE = Path(__file__).with_suffix(".cu")
SLOTS = (2, 4, 8)
PARTS = SLOTS[-1]  # partials that one launch reads
VECTOR = 8  # elements that one thread takes
THREADS = 256

Kind = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Part:
    """Partial results in device memory: rows ``[start, stop)``, every one contiguous."""

    output: int
    lse: int
    start: int
    stop: int


@dataclass(frozen=True)
class MergeCall:
    """One launch: merge `parts`, and a float32 `running` result, over some rows.

    Parameters
    ----------
    kind
        The dtype of the parts.
    target
        The dtype of the output; ``float32`` to fold parts into a running result.
    output, lse
        Where row 0 of the output ``[rows, heads, dim]`` and LSE ``[rows, heads]`` would be.
    start, stop
        The rows to merge.
    parts
        At most `PARTS`.
    running, running_lse
        Row 0 of a float32 result to go on from; 0 where there is none. The output may be one of
        the parts, or `running`, at the same rows.
    sinks
        The sinks of all heads in float32; 0 where there are none.

    """

    kind: Kind
    target: Kind
    output: int
    lse: int
    start: int
    stop: int
    heads: int
    dim: int
    parts: Sequence[Part]
    running: int = 0
    running_lse: int = 0
    sinks: int = 0

    @property
    def slots(self) -> int:
        """How many parts the kernel is compiled for."""
        return next(slots for slots in SLOTS if slots >= len(self.parts))

    @property
    def kernel(self) -> str:
        """What tells compiled kernels apart."""
        return f"{self.kind} {self.target} {self.slots} {self.running != 0} {self.sinks != 0}"

    @property
    def source(self) -> str:
        """CUDA C++ for these dtypes, and so many parts."""
        text = TEMPLATE.read_text()
        for name, value in (
            ("KIND", NAMES[self.kind]),
            ("TARGET", NAMES[self.target]),
            ("SLOTS", str(self.slots)),
            ("RUNNING", "true" if self.running else "false"),
            ("SINKS", "true" if self.sinks else "false"),
        ):
            text = text.replace(name, value)
        return text

    @property
    def grid(self) -> int:
        """Blocks of `block` threads."""
        return -(-(self.stop - self.start) * self.heads // self.block[1])

    @property
    def block(self) -> tuple[int, int]:
        """Threads a block: one a vector of a row and head, and so many rows and heads."""
        lanes = self.dim // VECTOR
        return lanes, THREADS // lanes

    @property
    def words(self) -> tuple[int, ...]:
        """The kernel's argument, a struct of 64-bit words; a row and head are counted as one.

        Unused parts have no rows.
        """
        heads = self.heads
        flat = [
            word
            for part in self.parts
            for word in (part.output, part.lse, part.start * heads, part.stop * heads)
        ]
        flat += [0] * 4 * (self.slots - len(self.parts))
        return (
            self.output, self.lse, self.running, self.running_lse, self.sinks,
            self.start * heads, self.stop * heads, self.dim, heads, *flat,
        )  # fmt: skip


NAMES = {"bfloat16": "Bfloat16", "float16": "Float16", "float32": "float"}
