// The innermost part of a convolution's weight gradient: a register tile of output channels by
// vectors of input channels, summed over the pixels of some rows.
#pragma once

#include "conv_panels.h"

FR_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kTile = 8;
constexpr int kTileVecs = 3;
#elif defined(__AVX2__)
constexpr int kTile = 4;
constexpr int kTileVecs = 1;
#else
constexpr int kTile = 2;
constexpr int kTileVecs = 1;
#endif

constexpr int64_t kWgradBlock = 8;  // steps from one round of prefetches to the next

// to[k][:] (+)= sum over rows and steps of g[row][step][k] * z[:][slot of row][step][lane].
template <class T, int kVecs>
__attribute__((noinline)) void wgrad_tile(const Element<T>* g, const Element<T>* z,
                                          const int64_t* slots, int64_t rows, int64_t row_steps,
                                          int64_t begin, int64_t end, int64_t vector_stride,
                                          bool add, Acc<T>* to, int64_t to_stride,
                                          Stream (&ahead)[2]) {
  constexpr int kParts = kVecs * kRegisters, kPart = kLanes<Acc<T>> / kRegisters;
  Register<T> sum[kTile][kParts] = {};
  for (int64_t row = 0; row < rows; ++row) {
    if (slots[row] < 0) continue;
    const Element<T>* a = g + (row * row_steps + begin) * kTile * kPer<T>;
    const Element<T>* b = z + (slots[row] * row_steps + begin) * kVecElements<T>;
    for (int64_t step = begin; step < end;) {
      for (Stream& stream : ahead) stream.prefetch<2>();
      const int64_t stop = end - step < kWgradBlock ? end : step + kWgradBlock;
      for (; step < stop; ++step) {
        Register<T> w[kParts];
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v)
          w[v] = load_register<T>(b + v / kRegisters * vector_stride +
                                  v % kRegisters * (kVecElements<T> / kRegisters));
#pragma GCC unroll 8
        for (int k = 0; k < kTile; ++k) {
          const Register<T> x = splat_step<T>(a + k * kPer<T>);
#pragma GCC unroll 16
          for (int v = 0; v < kParts; ++v) multiply_add<T>(sum[k][v], x, w[v]);
        }
        a += kTile * kPer<T>;
        b += kVecElements<T>;
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kTile; ++k)
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) {
      Acc<T>* at = to + k * to_stride + v * kPart;
      if (add) sum[k][v] += load_register<T>(at);
      __builtin_memcpy(at, &sum[k][v], kRegisterBytes);
    }
}

FR_NAMESPACE_END
