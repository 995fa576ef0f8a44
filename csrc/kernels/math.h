// Per-element formulas, shared by every kernel on every device. V is a scalar, or on the CPU a
// vector of them: comparisons and ?: work on both.
#pragma once

#include "api.h"

#if defined(__CUDACC__) || defined(FUSED_RESNET_SIMT)
#define FR_INLINE __host__ __device__ __forceinline__
#else
#define FR_INLINE static inline __attribute__((always_inline))
#endif

namespace fused_resnet::math {

// relu(NaN) is NaN and relu(-0) is -0, as torch.relu: only what compares below zero is replaced.
template <class V>
FR_INLINE V relu(V x) {
  return x < V{} ? V{} : x;
}

template <class V>
FR_INLINE V activate(V x, Act act) {
  return act == Act::relu ? relu(x) : x;
}

// The gradient g of relu's output y: selected, so that a NaN in g stays out where relu is flat, and
// passed on where y is NaN, as torch does.
template <class V>
FR_INLINE V relu_backward(V y, V g) {
  return y <= V{} ? V{} : g;
}

// torch.maximum: NaN on either side wins.
template <class V>
FR_INLINE V maximum(V a, V b) {
  V larger = a > b ? a : b;
  return a != a ? a : larger;
}

#if defined(__CUDACC__)
__device__ __forceinline__ float maximum(float a, float b) {  // the same in one instruction
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}
#endif

// What maximum(a, b) passes on of its result's gradient g: all of it to the larger, half to each of
// equals and, as torch has it, all to each where one is NaN.
template <class V>
struct Shares {
  V first, second;
};
template <class V>
FR_INLINE Shares<V> maximum_backward(V a, V b, V g) {
  const V share = a == b ? g / 2 : g;
  return {a < b ? V{} : share, a > b ? V{} : share};
}

FR_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FR_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class V>
FR_INLINE V scale_shift(V x, V scale, V shift) {
  return x * scale + shift;
}

}  // namespace fused_resnet::math
