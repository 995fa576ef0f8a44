// Storage types, the types they are computed in, and vectors that one memory instruction moves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../api.h"

namespace fused_resnet::cuda {

constexpr int kVectorBytes = 16;  // the widest access one thread can make

// The type a storage type is computed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// x * y + z, rounded once.
__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double multiply_add(double x, double y, double z) {
  return fma(x, y, z);
}

// n adjacent elements.
template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  static_assert(n * sizeof(T) <= kVectorBytes);
  T at[n];
};

// What one memory instruction moves. keep_together() changes nothing, but without it the compiler
// may see through the words, and move the elements in them one by one.
template <int bytes>
struct Words;
template <>
struct Words<16> {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<4> {
  using type = uint32_t;
};
template <>
struct Words<2> {
  using type = uint16_t;
};
template <>
struct Words<1> {
  using type = uint8_t;
};

__device__ __forceinline__ void keep_together(uint4& w) {
  asm volatile("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w));
}
__device__ __forceinline__ void keep_together(uint2& w) { asm volatile("" : "+r"(w.x), "+r"(w.y)); }
__device__ __forceinline__ void keep_together(uint32_t&) {}
__device__ __forceinline__ void keep_together(uint16_t&) {}
__device__ __forceinline__ void keep_together(uint8_t&) {}

// p must be aligned as the vector is.
template <int n, class T>
__device__ __forceinline__ Vector<T, n> load(const T* p) {
  auto words = *reinterpret_cast<const typename Words<n * sizeof(T)>::type*>(p);
  keep_together(words);
  Vector<T, n> v;
  memcpy(&v, &words, sizeof(v));
  return v;
}
template <int n, class T>
__device__ __forceinline__ void store(T* p, const Vector<T, n>& v) {
  typename Words<n * sizeof(T)>::type words;
  memcpy(&words, &v, sizeof(v));
  keep_together(words);
  *reinterpret_cast<decltype(words)*>(p) = words;
}

// 16 bytes to global memory. For sm_80 nvcc splits such stores where they are in a loop, unless it
// is told the instruction.
template <int n, class T>
__device__ __forceinline__ void store_global(T* p, const Vector<T, n>& v) {
  static_assert(n * sizeof(T) == 16);
#if defined(FUSED_RESNET_SIMT)
  store<n>(p, v);
#else
  uint4 words;
  memcpy(&words, &v, sizeof(v));
  __stwb(reinterpret_cast<uint4*>(p), words);
#endif
}

constexpr int element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// n adjacent elements in the type they are computed in.
template <class A, int n>
struct Wide {
  A at[n];
};

// f(j) for each of n lanes j.
template <int n, class F>
__device__ __forceinline__ auto each(const F& f) {
  Wide<decltype(f(0)), n> result;
#pragma unroll
  for (int j = 0; j < n; ++j) result.at[j] = f(j);
  return result;
}

template <int n, class T>
__device__ __forceinline__ Wide<Acc<T>, n> widen(const Vector<T, n>& v) {
  return each<n>([&](int j) { return widen(v.at[j]); });
}
template <int n, class T>
__device__ __forceinline__ Wide<Acc<T>, n> load_wide(const T* p) {
  return widen(load<n>(p));
}
template <class T, int n>
__device__ __forceinline__ void store_narrow(T* p, const Wide<Acc<T>, n>& v) {
  Vector<T, n> narrowed;
#pragma unroll
  for (int j = 0; j < n; ++j) narrowed.at[j] = narrow<T>(v.at[j]);
  store<n>(p, narrowed);
}

inline bool vector_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

// n values of n channels. p must be aligned as a vector is where n is more than 1.
template <int n, class A>
__device__ __forceinline__ Wide<A, n> load_channels(const A* p) {
  constexpr int kPiece = n * sizeof(A) < kVectorBytes ? n : kVectorBytes / sizeof(A);
  Wide<A, n> values;
#pragma unroll
  for (int i = 0; i < n; i += kPiece) {
    const Vector<A, kPiece> piece = load<kPiece>(p + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) values.at[i + j] = piece.at[j];
  }
  return values;
}

// Calls f with a value of the storage type `dtype` stands for.
template <class F>
Status dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f16:
      return f(__half{});
  }
  return Status::unsupported;
}

}  // namespace fused_resnet::cuda
