"""The merge of partial results: one kernel, in float32, each partial weighted once.

A partial holds the attention of some rows to some keys, already divided by its own softmax
denominator, and that denominator's logarithm. With ``L`` the greatest of them, ::

    lse    = L + log1p(sum of exp(lse_i - L), the greatest left out)
    output = sum of exp(lse_i - lse) · output_i

A partial of no keys has LSE −∞ and weighs nothing; a row of none gives 0 and −∞.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PARTS = 8  # partials that one launch reads
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
        The dtype of the output: `kind`, or ``float32`` to fold parts into a running result.
    output, lse
        Where row 0 of the output ``[rows, heads, dim]`` and LSE ``[rows, heads]`` would be.
    start, stop
        The rows to merge.
    parts
        At most `PARTS`.
    running, running_lse
        Row 0 of a float32 result to go on from; 0 where there is none. The output may be one of
        the parts, or `running`, at the same rows.

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

    @property
    def kernel(self) -> str:
        """What tells compiled kernels apart."""
        return f"{self.kind} {self.target}"

    def source(self, template: str) -> str:
        """Fill in the dtypes."""
        return template.replace("KIND", NAMES[self.kind]).replace("TARGET", NAMES[self.target])

    @property
    def grid(self) -> int:
        """Blocks of `block` threads, one thread a vector."""
        vectors = (self.stop - self.start) * self.heads * (self.dim // VECTOR)
        return -(-vectors // self.block)

    @property
    def block(self) -> int:
        """Threads a block: those of a row and head are in the same one."""
        lanes = self.dim // VECTOR
        return THREADS // lanes * lanes

    @property
    def words(self) -> tuple[int, ...]:
        """The kernel's argument, a struct of 64-bit words; unused parts have no rows."""
        flat: list[int] = []
        for index in range(PARTS):
            if index < len(self.parts):
                part = self.parts[index]
                flat += [part.output, part.lse, part.start, part.stop]
            else:
                flat += [0, 0, 0, 0]
        return (
            self.output, self.lse, self.running, self.running_lse,
            self.start, self.stop, self.heads, self.dim, *flat,
        )  # fmt: skip


NAMES = {"bfloat16": "Bfloat16", "float16": "Float16", "float32": "float"}

# The two 16-bit formats by hand: NVRTC has no header for them unless a CUDA toolkit is installed.
SOURCE = r"""
struct Bfloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };
typedef long long i64;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float widen(Float16 x) {
  float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y;
}
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, Float16& y) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
__device__ inline void narrow(float x, Bfloat16& y) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

typedef KIND In;
typedef TARGET Out;
template <typename T> struct Vector;
template <> struct __align__(16) Vector<Bfloat16> { Bfloat16 at[8]; };
template <> struct __align__(16) Vector<Float16> { Float16 at[8]; };
template <> struct __align__(16) Vector<float> { float at[8]; };

struct Part { const In* output; const float* lse; i64 start, stop; };
struct Call {
  Out* output; float* lse; const float* running; const float* running_lse;
  i64 start, stop, heads, dim;
  Part parts[8];
};

extern "C" __global__ void __launch_bounds__(256) merge(const Call call)
{
  const Part (&parts)[8] = call.parts;
  Out* const output = call.output;
  float* const lse = call.lse;
  const float* const running = call.running;
  const float* const running_lse = call.running_lse;
  const i64 start = call.start, stop = call.stop, heads = call.heads, dim = call.dim;
  const i64 lanes = dim / 8;
  const i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const i64 place = index / lanes, lane = index % lanes;  // place: row and head
  const i64 row = start + place / heads, head = place % heads;
  const bool inside = row < stop;
  const i64 at = row * heads + head;
  const float none = -__int_as_float(0x7f800000);

  float logs[9], most = none;
  int best = -1;
  #pragma unroll
  for (int i = 0; i < 9; ++i) {
    logs[i] = none;
    if (!inside) {}
    else if (i == 8) { if (running_lse) logs[i] = running_lse[at]; }
    else if (row >= parts[i].start && row < parts[i].stop)
      logs[i] = parts[i].lse[(row - parts[i].start) * heads + head];
    if (logs[i] > most) { most = logs[i]; best = i; }
  }
  float rest = 0.f;
  #pragma unroll
  for (int i = 0; i < 9; ++i)
    if (i != best && logs[i] > none) rest += expf(logs[i] - most);
  const float all = best < 0 ? none : most + log1pf(rest);
  const float scale = 1.f / (1.f + rest);

  float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (logs[i] > none) {
      const float weight = expf(logs[i] - most) * scale;
      const i64 from = ((row - parts[i].start) * heads + head) * dim + lane * 8;
      const Vector<In> part = *reinterpret_cast<const Vector<In>*>(parts[i].output + from);
      #pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += weight * widen(part.at[e]);
    }
  }
  if (logs[8] > none) {
    const float weight = expf(logs[8] - most) * scale;
    const Vector<float> part =
        *reinterpret_cast<const Vector<float>*>(running + at * dim + lane * 8);
    #pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += weight * part.at[e];
  }
  __syncthreads();  // the LSE is about to be replaced: all threads of a row have read it
  if (!inside) return;
  Vector<Out> merged;
  #pragma unroll
  for (int e = 0; e < 8; ++e) narrow(sum[e], merged.at[e]);
  *reinterpret_cast<Vector<Out>*>(output + at * dim + lane * 8) = merged;
  if (lane == 0) lse[at] = all;
}
"""
