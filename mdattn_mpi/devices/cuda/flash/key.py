"""What a compiled kernel depends on: neither lengths, strides nor bounds."""

from __future__ import annotations

from typing import NamedTuple

from mdattn_mpi.devices.cuda.attention import ONE, AttentionCall, MaskKind


class KernelKey(NamedTuple):
    """One compiled kernel."""

    sm: tuple[int, int]
    head_dim: int
    v_head_dim: int
    group_heads: int
    dtype: str
    out_dtype: str
    mask: MaskKind
    capped: bool
    packed: bool = False  # documents, each in a band of its own

    @property
    def batch(self) -> int:
        """Dims of one before those of the inputs: the batch, unless documents are packed."""
        return 0 if self.packed else 1

    @property
    def ones(self) -> int:
        """Dims of one before those of output and LSE: the batch, and on SM 10.0 the split."""
        return self.batch + (self.sm[0] == 10 and self.out_dtype != self.dtype)

    @staticmethod
    def of(call: AttentionCall, sm: tuple[int, int]) -> KernelKey:
        """Return the kernel that does `call`."""
        group_heads = call.q_heads // call.kv_heads
        dims = call.head_dim, call.v_head_dim
        types = call.dtype, call.out_dtype
        capped, packed = call.softcap > 0, call.documents != ONE
        return KernelKey(sm, *dims, group_heads, *types, call.mask, capped, packed)
