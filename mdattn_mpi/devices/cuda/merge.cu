// The merge of partial results; `merge.py` says what it computes, and fills in five names in capitals.
// The two 16-bit formats are done by hand: NVRTC has no header for them unless a CUDA toolkit is
// installed.

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
  const float* sinks; i64 begin, end, dim, heads;
  Part parts[SLOTS];
};

extern "C" __global__ void __launch_bounds__(256) merge(const Call call)
{
  const i64 at = call.begin + (i64)blockIdx.x * blockDim.y + threadIdx.y;
  const i64 lane = threadIdx.x * 8;
  const bool inside = at < call.end;
  const float none = -__int_as_float(0x7f800000);

  // Everything is asked for before anything is looked at: memory is all that this kernel waits for.
  float logs[SLOTS + 2];
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
  logs[SLOTS + 1] = SINKS && inside ? call.sinks[at % call.heads] : none;  // has no value

  float most = none;
  int best = -1;
  #pragma unroll
  for (int i = 0; i <= SLOTS + 1; ++i)
    if (logs[i] > most) { most = logs[i]; best = i; }
  float rest = 0.f;
  #pragma unroll
  for (int i = 0; i <= SLOTS + 1; ++i)
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
