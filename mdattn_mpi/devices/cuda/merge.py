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
    def slots(self) -> int:
        """How many parts the kernel is compiled for."""
        return next(slots for slots in SLOTS if slots >= len(self.parts))

    @property
    def kernel(self) -> str:
        """What tells compiled kernels apart."""
        return f"{self.kind} {self.target} {self.slots} {self.running != 0}"

    def source(self, template: str) -> str:
        """Fill in the dtypes and how many parts there are."""
        for name, value in (
            ("KIND", NAMES[self.kind]),
            ("TARGET", NAMES[self.target]),
            ("SLOTS", str(self.slots)),
            ("RUNNING", "true" if self.running else "false"),
        ):
            template = template.replace(name, value)
        return template

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
            self.output, self.lse, self.running, self.running_lse,
            self.start * heads, self.stop * heads, self.dim, *flat,
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

// Places are rows times heads: no thread needs to know which row its own is in.
struct Part { const In* output; const float* lse; i64 begin, end; };
struct Call {
  Out* output; float* lse; const float* running; const float* running_lse;
  i64 begin, end, dim;
  Part parts[SLOTS];
};

extern "C" __global__ void __launch_bounds__(256) merge(const Call call)
{
  const i64 at = call.begin + (i64)blockIdx.x * blockDim.y + threadIdx.y;
  const i64 lane = threadIdx.x * 8;
  const bool inside = at < call.end;
  const float none = -__int_as_float(0x7f800000);

  // Everything is asked for before anything is looked at: memory is all that this kernel waits for.
  float logs[SLOTS + 1];
  Vector<In> found[SLOTS];
  Vector<float> before;
  #pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const Part& part = call.parts[i];
    logs[i] = none;
    if (inside && at >= part.begin && at < part.end) {
      const i64 place = at - part.begin;
      logs[i] = part.lse[place];
      found[i] = *reinterpret_cast<const Vector<In>*>(part.output + place * call.dim + lane);
    }
  }
  logs[SLOTS] = none;
  if (RUNNING && inside) {
    logs[SLOTS] = call.running_lse[at];
    before = *reinterpret_cast<const Vector<float>*>(call.running + at * call.dim + lane);
  }

  float most = none;
  int best = -1;
  #pragma unroll
  for (int i = 0; i <= SLOTS; ++i)
    if (logs[i] > most) { most = logs[i]; best = i; }
  float rest = 0.f;
  #pragma unroll
  for (int i = 0; i <= SLOTS; ++i)
    if (i != best && logs[i] > none) rest += expf(logs[i] - most);
  const float scale = 1.f / (1.f + rest);

  float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  #pragma unroll
  for (int i = 0; i <= SLOTS; ++i) {
    if (logs[i] > none) {
      const float weight = expf(logs[i] - most) * scale;
      #pragma unroll
      for (int e = 0; e < 8; ++e)
        sum[e] += weight * (i < SLOTS ? widen(found[i < SLOTS ? i : 0].at[e]) : before.at[e]);
    }
  }
  __syncthreads();  // the LSE is about to be replaced: all threads of a place have read it
  if (!inside) return;
  Vector<Out> merged;
  #pragma unroll
  for (int e = 0; e < 8; ++e) narrow(sum[e], merged.at[e]);
  *reinterpret_cast<Vector<Out>*>(call.output + at * call.dim + lane) = merged;
  if (lane == 0) call.lse[at] = best < 0 ? none : most + log1pf(rest);
}
"""
