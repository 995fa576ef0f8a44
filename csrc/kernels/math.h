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

#if defined(__CUDACC__)
FR_INLINE float square_root(float x) { return sqrtf(x); }
FR_INLINE double square_root(double x) { return sqrt(x); }
#else
FR_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FR_INLINE double square_root(double x) { return __builtin_sqrt(x); }
#endif

template <class V>
FR_INLINE V scale_shift(V x, V scale, V shift) {
  return x * scale + shift;
}

// What BatchNorm makes of a batch's statistics, in fp64, each number rounded to A.
template <class A>
struct Normalization {
  A scale, shift, invstd;
};

template <class A>
FR_INLINE Normalization<A> normalization(double mean, double m2, double count, double weight,
                                         double bias, double eps) {
  const A invstd = static_cast<A>(1 / square_root(m2 / count + eps));
  const A scale = static_cast<A>(weight * invstd);
  // The shift makes up for what rounding the scale does to the mean.
  return {scale, static_cast<A>(bias - mean * scale), invstd};
}

FR_INLINE double running_average(double before, double value, double momentum) {
  return (1 - momentum) * before + momentum * value;
}

// BatchNorm's gradient is scale * g + slope * (x - mean) + offset; see BnActBackwardArgs.
template <class A>
struct GradientTerms {
  A slope, offset;
};

template <class A>
FR_INLINE GradientTerms<A> gradient_terms(double scale, double invstd, double sum_g, double sum_gx,
                                          double count) {
  const double share = -scale / count;
  return {static_cast<A>(share * invstd * sum_gx), static_cast<A>(share * sum_g)};
}

}  // namespace fused_resnet::math
