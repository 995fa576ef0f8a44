// Vectors of 64 bytes, in the compiler's own vector type: one AVX-512 register, two of AVX2, and
// plain correct code anywhere else. Arithmetic, comparison and ?: are the language's; this file
// adds loading and storing with conversion. Half types are held as their bits and computed in fp32.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "isa.h"

FR_NAMESPACE_BEGIN

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type a storage type is computed in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
// The activations of conv_int8, and what they may be widened to.
template <>
struct AccOf<uint8_t> {
  using type = int32_t;
};
template <>
struct AccOf<int16_t> {
  using type = int32_t;
};
template <>
struct AccOf<int32_t> {
  using type = int32_t;
};
template <class T>
using Acc = typename AccOf<T>::type;

using VecF = float __attribute__((vector_size(64)));
using VecD = double __attribute__((vector_size(64)));
using VecI = int32_t __attribute__((vector_size(64)));

template <class A>
struct VecOf {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};
template <>
struct VecOf<int32_t> {
  using type = VecI;
};
template <class A>
using Vec = typename VecOf<A>::type;  // of an accumulation type

template <class A>
constexpr int kLanes = 64 / sizeof(A);

using VecU32 = uint32_t __attribute__((vector_size(64)));
using VecU16 = uint16_t __attribute__((vector_size(32)));
using VecI16 = int16_t __attribute__((vector_size(32)));
using VecU8 = uint8_t __attribute__((vector_size(16)));

#define FR_VEC static inline __attribute__((always_inline))
#define FR_LAMBDA __attribute__((always_inline))

// Broadcast. x - 0 is x for every x, -0 and NaN included, so compilers reduce it to the broadcast;
// x + 0 would not be (-0 + 0 is +0).
FR_VEC VecF splat(float x) { return x - VecF{}; }
FR_VEC VecD splat(double x) { return x - VecD{}; }

FR_VEC VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
FR_VEC VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
FR_VEC VecI load(const int32_t* p) {
  VecI v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
FR_VEC VecI load(const uint8_t* p) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  VecU8 bytes;
  __builtin_memcpy(&bytes, p, 16);
  return __builtin_convertvector(bytes, VecI);
#endif
}
FR_VEC VecF load(const bf16* p) {
#if defined(__AVX512F__)
  // GCC 12 makes six instructions of the conversion below.
  VecU32 wide = (VecU32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
  VecU16 h;
  __builtin_memcpy(&h, p, 32);
  VecU32 wide = __builtin_convertvector(h, VecU32);
#endif
  return (VecF)(wide << 16);
}

FR_VEC void store(float* p, VecF v) { __builtin_memcpy(p, &v, 64); }
FR_VEC void store(double* p, VecD v) { __builtin_memcpy(p, &v, 64); }
FR_VEC void store(int32_t* p, VecI v) { __builtin_memcpy(p, &v, 64); }
FR_VEC void store(int16_t* p, VecI v) {
  const VecI16 half = __builtin_convertvector(v, VecI16);
  __builtin_memcpy(p, &half, 32);
}
FR_VEC void store(uint8_t* p, VecI v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
  const VecU8 bytes = __builtin_convertvector(v, VecU8);
  __builtin_memcpy(p, &bytes, 16);
#endif
}
FR_VEC void store(bf16* p, VecF v) {
  // Round to nearest even; a NaN keeps its sign and becomes quiet rather than rounding to infinity.
  VecU32 u = (VecU32)v;
  VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecU32 quiet = (u >> 16) | 0x40u;
  VecU16 h = __builtin_convertvector(v != v ? quiet : rounded, VecU16);
  __builtin_memcpy(p, &h, 32);
}

#if defined(__AVX512F__)
FR_VEC VecF load(const f16* p) {
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
FR_VEC void store(f16* p, VecF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
FR_VEC VecF load(const f16* p) {
  __m256 half[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
  VecF v;
  __builtin_memcpy(&v, half, 64);
  return v;
}
FR_VEC void store(f16* p, VecF v) {
  __m256 half[2];
  __builtin_memcpy(half, &v, 64);
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT));
}
#else
FR_VEC VecF load(const f16* p) {
  _Float16 h[16];
  VecF v;
  __builtin_memcpy(h, p, 32);
  for (int i = 0; i < 16; ++i) v[i] = (float)h[i];
  return v;
}
FR_VEC void store(f16* p, VecF v) {
  _Float16 h[16];
  for (int i = 0; i < 16; ++i) h[i] = (_Float16)v[i];
  __builtin_memcpy(p, h, 32);
}
#endif

// A product, rounded: no part of a fused multiply-add, so that the result is that of processors
// without. (GCC's __builtin_assoc_barrier takes vectors apart.)
FR_VEC VecF rounded(VecF product) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(product));
#elif defined(__FMA__)
  __m256 half[2];
  __builtin_memcpy(half, &product, 64);
  __asm__("" : "+x"(half[0]), "+x"(half[1]));
  __builtin_memcpy(&product, half, 64);
#elif !defined(__x86_64__)
  __asm__("" : "+m"(product));
#endif
  return product;
}

// a > b ? a : b and a < b ? a : b: b where a is NaN.
FR_VEC VecF larger(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
FR_VEC VecF smaller(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// The first n elements only, 0 <= n < lanes; the rest of the vector is zero.
template <class T>
FR_VEC Vec<Acc<T>> load(const T* p, int64_t n) {
  T buffer[kLanes<Acc<T>>] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
FR_VEC void store(T* p, Vec<Acc<T>> v, int64_t n) {
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

template <class T>
FR_VEC Acc<T> load_one(const T* p) {
  return load(p, 1)[0];
}

// Calls f with a value of the storage type `dtype` stands for.
template <class F>
FR_VEC Status dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
  return Status::unsupported;
}

// Runs f(begin, end) over [0, n) in the pool, in pieces of at least `grain`.
template <class F>
FR_VEC void parallel(const Pool& pool, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  pool.run(n, grain, const_cast<F*>(&f), [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  });
}

FR_NAMESPACE_END
