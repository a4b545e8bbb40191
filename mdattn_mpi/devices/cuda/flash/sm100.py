"""FlashAttention 4 on SM 10.0: built, never executed.

Nothing here may be imported before `engine` has named the architecture to compile for.
"""

from flash_attn.cute.flash_fwd_sm100 import FlashAttentionForwardSm100

from mdattn_mpi.devices.cuda.flash.compiling import compile_attention, soft_cap
from mdattn_mpi.devices.cuda.flash.key import KernelKey


def compile_kernel(key: KernelKey):
    """Compile the kernel of a key; see `compile_attention`.

    Its float32 outputs are those of one split of the keys, of which there is one.
    """
    kernel = FlashAttentionForwardSm100(
        key.head_dim,
        key.v_head_dim,
        key.group_heads,
        is_causal=key.mask == "causal",
        is_local=key.mask == "band",
        is_split_kv=key.out_dtype != key.dtype,
        pack_gqa=False,
        is_static_persistent=False,  # it would ask the driver for the number of multiprocessors
        score_mod=soft_cap if key.capped else None,
    )
    return compile_attention(key, kernel)
