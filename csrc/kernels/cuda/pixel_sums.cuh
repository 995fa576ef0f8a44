// Matrix products that are summed over pixels: of both operands, a stage has some pixels with the
// values of the tile's rows or columns. They pass through registers on the way to shared memory,
// where they are normalised, while the stage before is multiplied.
#pragma once

#include "../math.h"
#include "conv_load.cuh"

namespace fused_resnet::cuda {

// T is what lies in memory, Sums::T what is multiplied.
template <class T_, class Sums_, int rows, int columns, bool wide>
struct PixelBlock {
  using T = T_;
  using Sums = Sums_;
  using Operand = typename Sums::T;
  static constexpr bool kWide = wide;
  static constexpr int kRows = rows, kColumns = columns, kThreads = Sums::kThreads;
  static constexpr int kDepth = kStagePixels;
  static constexpr int kRowsBytes = kDepth * rows * static_cast<int>(sizeof(Operand));
  static constexpr int kStageBytes = kDepth * (rows + columns) * static_cast<int>(sizeof(Operand));
  static constexpr int kBytes = 2 * (kStageBytes + kDepth * static_cast<int>(sizeof(Pixel)));
};

// `width` values of the pixels of a stage, n adjacent ones of several pixels by each thread.
template <class B, int width>
class StagedOperand {
  using T = typename B::T;
  using Operand = typename B::Operand;

 public:
  static constexpr int n = kVectorBytes / sizeof(T);
  static constexpr int kUnits = width / n, kCount = B::kDepth * kUnits / B::kThreads;
  static constexpr int kApart = B::kThreads / kUnits;  // pixels
  static_assert(B::kThreads % kUnits == 0 && kCount * B::kThreads == B::kDepth * kUnits);
  static_assert(kCount * n <= 32);

  static __device__ __forceinline__ int first_value() { return threadIdx.x % kUnits * n; }
  static __device__ __forceinline__ int first_pixel() { return threadIdx.x / kUnits; }

  // From `at`, the thread's first value, on. Where element(pixel, position) is null there are
  // zeros; of wide loads, the first position stands for all n.
  template <class Position, class Element>
  __device__ __forceinline__ void fetch(const Conv& c, Position at, const Element& element) {
    inside_ = 0;
#pragma unroll
    for (int k = 0; k < (B::kWide ? 1 : n); ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T* const from = element(first_pixel() + i * kApart, at);
        if (!from) continue;
        if constexpr (B::kWide) {
          values_[i] = load<n>(from);
          inside_ |= ((1u << n) - 1) << i * n;
        } else {
          values_[i].at[k] = *from;
          inside_ |= 1u << (i * n + k);
        }
      }
      if (!B::kWide) at.advance(c, 1);
    }
  }

  // change(value, k) makes an operand of the k-th value.
  template <class Change>
  __device__ __forceinline__ void put(unsigned char* to, const Change& change) const {
    constexpr int kPart = kVectorBytes / sizeof(Operand);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int part = 0; part < n; part += kPart) {
        Vector<Operand, kPart> changed = {};
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          if (inside_ >> (i * n + part + k) & 1)
            changed.at[k] = change(values_[i].at[part + k], part + k);
        }
        store<kPart>(reinterpret_cast<Operand*>(
                         to + place(first_pixel() + i * kApart, first_value() + part)),
                     changed);
      }
    }
  }

 private:
  static __device__ __forceinline__ int place(int pixel, int value) {
    if constexpr (sizeof(Operand) == 2)
      return chunk_at<width * 2>(pixel, value / 8);
    else
      return value_at<Operand, width>(pixel, value);
  }

  Vector<T, n> values_[kCount];
  unsigned inside_;
};

// The normalisation of a thread's n values: z = act(x * scale + shift) rounded, or act(x).
template <class T>
struct Normalise {
  static constexpr int n = kVectorBytes / sizeof(T);
  Acc<T> scale[n], shift[n];
  bool scaled;
  Act act;

  // Of the channels from `at` on.
  __device__ __forceinline__ Normalise(const Conv& c, Depth at, int group) {
    scaled = c.scale != nullptr;
    act = c.act;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int channel = group * c.group_channels() + at.channel;
      const bool there = scaled && !at.ended(c);
      scale[k] = there ? static_cast<const Acc<T>*>(c.scale)[channel] : Acc<T>(1);
      shift[k] = there ? static_cast<const Acc<T>*>(c.shift)[channel] : Acc<T>(0);
      at.advance(c, 1);
    }
  }

  __device__ __forceinline__ Acc<T> operator()(T x, int k) const {
    Acc<T> z = widen(x);
    if (scaled) z = widen(narrow<T>(multiply_add(z, scale[k], shift[k])));
    return math::activate(z, act);
  }
};

// Adds the products of the pixels from `first` to `end`, of which only the last stage may be
// partial. operands.fetch(pixels, first pixel) and operands.put(rows, columns) bring one stage.
template <class B, class Operands>
__device__ __forceinline__ void sum_over_pixels(const Conv& c, int64_t first, int64_t end,
                                                unsigned char* memory, Operands& operands,
                                                typename B::Sums& sums) {
  Pixel* const tables = reinterpret_cast<Pixel*>(memory + 2 * B::kStageBytes);
  auto describe_pixels = [&](int64_t from, int slot) {
    if (threadIdx.x < B::kDepth && from < end)
      tables[slot * B::kDepth + threadIdx.x] = pixel_at(c, from, threadIdx.x);
  };
  if (first >= end) return;
  describe_pixels(first, 0);
  __syncthreads();
  operands.fetch(tables, first);
  describe_pixels(first + B::kDepth, 1);
  int slot = 0;
  for (int64_t from = first; from < end; from += B::kDepth, slot ^= 1) {
    unsigned char* const rows = memory + slot * B::kStageBytes;
    operands.put(rows, rows + B::kRowsBytes);
    __syncthreads();  // the stage and the next pixels are there, and all have left the stage before
    if (from + B::kDepth < end) operands.fetch(tables + (slot ^ 1) * B::kDepth, from + B::kDepth);
    sums.template multiply_by_depth<B::kDepth>(rows, rows + B::kRowsBytes);
    describe_pixels(from + 2 * B::kDepth, slot);
  }
}

}  // namespace fused_resnet::cuda
