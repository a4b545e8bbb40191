"""What the kernels of all architectures have in common: how they are called, and the soft cap.

Nothing here may be imported before `engine` has named the architecture to compile for.
"""

import math

import cuda.bindings.driver as cu
import cutlass
from cutlass import Float32, Int32, const_expr, cute
from flash_attn.cute.utils import AuxData
from quack.compile_utils import make_fake_tensor

from mdattn_mpi.devices.cuda.flash.key import KernelKey

ALIGNMENT = 16  # bytes, of every row
TYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": Float32}


@cute.jit
def soft_cap(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars):
    """``cap · tanh(score / cap)``, to float32.

    FlashAttention's own takes the fast tanh, whose error of 5e-4 is 0.02 in a score of 50: that
    would be 2 % of a weight.
    """
    cap, rate = aux_scalars
    return cap - 2.0 * cap / (1.0 + cute.math.exp2(score * rate, fastmath=True))


def compile_attention(key: KernelKey, kernel):
    """Compile ``attend(q, k, v, output, lse, rows, keys, scale, softcap, before, after, stream)``.

    For any lengths, strides and bounds. Tensors have dims of one before ours (see `KernelKey`); the
    LSE is given as ``[…, heads, tokens]``, with the strides that it has. ``rows`` and ``keys`` say
    where packed documents begin and the last one ends; else they are left out.
    """
    band = key.mask == "band"
    rows, keys, q_heads, kv_heads, ends = (cute.sym_int() for _ in range(5))

    def tensor(dtype: str, *shape, ones: int = key.batch):
        element = TYPES[dtype]
        return make_fake_tensor(element, (*[1] * ones, *shape), 8 * ALIGNMENT // element.width)

    @cute.jit
    def attend(
        q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, output: cute.Tensor, lse: cute.Tensor,
        q_starts: cute.Tensor | None, kv_starts: cute.Tensor | None,
        scale: Float32, softcap: Float32, before: Int32, after: Int32, stream: cu.CUstream,
    ):  # fmt: skip
        capping = (softcap, 2.0 * math.log2(math.e) / softcap) if const_expr(key.capped) else None
        kernel(
            q, k, v, output, lse, scale,
            mCuSeqlensQ=q_starts, mCuSeqlensK=kv_starts,
            window_size_left=before if const_expr(band) else None,
            window_size_right=after if const_expr(band) else None,
            aux_data=AuxData(None, capping), stream=stream,
        )  # fmt: skip

    return cute.compile(
        attend,
        tensor(key.dtype, rows, q_heads, key.head_dim),
        tensor(key.dtype, keys, kv_heads, key.head_dim),
        tensor(key.dtype, keys, kv_heads, key.v_head_dim),
        tensor(key.out_dtype, rows, q_heads, key.v_head_dim, ones=key.ones),
        make_fake_tensor(Float32, (*[1] * key.ones, q_heads, rows), 1, leading_dim=key.ones),
        *(make_fake_tensor(Int32, (ends,), 1) if key.packed else None for _ in range(2)),
        *(Float32(1.0), Float32(1.0), Int32(1), Int32(1)),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=False),
        options="--enable-tvm-ffi",
    )
