"""FlashAttention 4 on SM 9.0: its own kernel, and one that leaves the output in float32.

Nothing here may be imported before `engine` has named the architecture to compile for.
"""

import cutlass
from cutlass import Int32, const_expr, cute
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.interface import _tile_size_fwd_sm90
from flash_attn.cute.seqlen_info import SeqlenInfoQK
from quack import layout_utils

from mdattn_mpi.devices.cuda.flash.compiling import TYPES, compile_attention, soft_cap
from mdattn_mpi.devices.cuda.flash.key import KernelKey


class Float32Output(FlashAttentionForwardSm90):
    """The same, with an epilogue that writes the accumulators as they are.

    The stock one rounds them to 16 bits on their way through shared memory. Here they go from
    registers to their rows: measured as fast on an H100 from 8k tokens on.
    """

    use_tma_O = property(lambda self: False, lambda self, value: None)

    def _check_type(self, *types):
        """Accept an output of another type than the inputs'."""

    @cute.jit
    def epilogue(
        self, acc_O: cute.Tensor, lse: cute.Tensor, mO: cute.Tensor, mLSE: cute.Tensor,
        sO: cute.Tensor, seqlen: SeqlenInfoQK, gmem_tiled_copy_O: cute.TiledCopy,
        tma_atom_O: None, tiled_mma: cute.TiledMma, tidx: Int32,
        m_block: Int32, head_idx: Int32, batch_idx: Int32,
    ):  # fmt: skip
        """Write this thread's part of a tile's output and LSE."""
        mma = tiled_mma.get_slice(tidx)
        tile = (self.tile_m, self.tile_hdimv)
        places = layout_utils.reshape_acc_to_mn(mma.partition_C(cute.make_identity_tensor(tile)))
        heads = self.qhead_per_kvhead if const_expr(self.pack_gqa) else 1
        rows = seqlen.seqlen_q * heads - m_block * self.tile_m
        output = seqlen.offset_batch_Q(mO, batch_idx, dim=3)[None, None, head_idx]
        output = layout_utils.reshape_acc_to_mn(
            mma.partition_C(cute.local_tile(output, tile, (m_block, 0)))
        )
        logs = seqlen.offset_batch_Q(mLSE, batch_idx, dim=2)[None, head_idx]
        logs = cute.local_tile(logs, (self.tile_m,), (m_block,))
        across = cute.make_layout((self.tile_hdimv,), stride=(0,))
        logs = cute.make_tensor(logs.iterator, cute.append(logs.layout, across))
        logs = layout_utils.reshape_acc_to_mn(mma.partition_C(logs))
        sums = layout_utils.reshape_acc_to_mn(acc_O)
        for row in cutlass.range_constexpr(cute.size(output.shape[0])):
            if places[row, 0][0] < rows:
                for dim in cutlass.range_constexpr(cute.size(output.shape[1])):
                    if const_expr(not self.check_hdim_v_oob) or places[0, dim][1] < mO.shape[1]:
                        output[row, dim] = sums[row, dim]
                if places[0, 0][1] == 0:
                    logs[row, 0] = lse[row]


def compile_kernel(key: KernelKey):
    """Compile the kernel of a key; see `compile_attention`."""
    causal, band = key.mask == "causal", key.mask == "band"
    tile = _tile_size_fwd_sm90(key.head_dim, key.v_head_dim, causal, band)
    kind = FlashAttentionForwardSm90 if key.out_dtype == key.dtype else Float32Output
    kernel = kind(
        TYPES[key.dtype],
        key.head_dim,
        key.v_head_dim,
        key.group_heads,
        is_causal=causal,
        is_local=band,
        score_mod=soft_cap if key.capped else None,
        # Rows of all heads of a group share tiles, where a warp group's 64 rows take them evenly.
        pack_gqa=key.group_heads > 1 and 64 % key.group_heads == 0,
        tile_m=tile.m_block_size,
        tile_n=tile.n_block_size,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        intra_wg_overlap=tile.intra_wg_overlap,
        mma_pv_is_rs=tile.mma_pv_is_rs,
    )
    return compile_attention(key, kernel)
