// Matrix products that are summed over pixels: of both operands, a stage has some pixels with the
// values of the tile's rows or columns. Stages are copied to shared memory several ahead; each
// thread normalises in place what it has copied.
#pragma once

#include "../math.h"
#include "conv_load.cuh"

namespace fused_resnet::cuda {

// Stages of a widened block have room for a second image's values beside the rows'.
template <class T_, class Sums_, int rows, int columns, bool wide, bool widened = false>
struct PixelBlock {
  using T = T_;
  using Sums = Sums_;
  static constexpr bool kWide = wide;
  static constexpr int kRows = rows, kColumns = columns, kThreads = Sums::kThreads;
  static constexpr int kAtOnce = pixel_blocks(sizeof(T), kThreads);  // on a multiprocessor
  static constexpr int kDepth = kStagePixels;
  static constexpr int kRowsBytes = kDepth * rows * static_cast<int>(sizeof(T));
  static constexpr int kOperandBytes = kDepth * (rows + columns) * static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = kOperandBytes + (widened ? kRowsBytes : 0);
  static constexpr int kStages = wide ? 4 - widened : 2;  // what is not wide is not copied ahead
  static constexpr int kBytes = kStages * (kStageBytes + kDepth * static_cast<int>(sizeof(Source)));
  static_assert(kThreads >= kStages * kDepth);
};

// A position that is a channel.
struct Channel {
  int at;
  __device__ __forceinline__ void advance(const Conv&, int by) { at += by; }
};

// `width` values of the pixels of a stage, n adjacent ones of several pixels by each thread.
template <class B, int width>
class StagedOperand {
  using T = typename B::T;

 public:
  static constexpr int n = kVectorBytes / sizeof(T);
  static constexpr int kUnits = width / n, kCount = B::kDepth * kUnits / B::kThreads;
  static constexpr int kApart = B::kThreads / kUnits;  // pixels
  static_assert(B::kThreads % kUnits == 0 && kCount * B::kThreads == B::kDepth * kUnits);

  static __device__ __forceinline__ int first_value() { return threadIdx.x % kUnits * n; }
  static __device__ __forceinline__ int first_pixel() { return threadIdx.x / kUnits; }

  // The sum of value `i` over the pixels, of which each thread has added up those that it fetches,
  // for each of its n values. All have passed a barrier.
  template <class A>
  static __device__ __forceinline__ double total(const A (&totals)[n][B::kThreads], int i) {
    double sum = 0;
    for (int thread = i / n; thread < B::kThreads; thread += kUnits) sum += totals[i % n][thread];
    return sum;
  }

  // From `at`, the thread's first value, on. Where element(pixel, position) is null there are
  // zeros; of wide loads, the first position stands for all n.
  template <class Position, class Element>
  __device__ __forceinline__ void fetch(const Conv& c, Position at, unsigned char* to, int slot,
                                        const Element& element) {
    uint32_t inside = 0;
    if constexpr (B::kWide) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T* const from = element(first_pixel() + i * kApart, at);
        cp_async16(to + place(i), from ? from : c.x, from ? kVectorBytes : 0);
        inside |= uint32_t{from != nullptr} << i;
      }
    } else {
      Vector<T, n> values[kCount] = {};
#pragma unroll
      for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const T* const from = element(first_pixel() + i * kApart, at);
          if (!from) continue;
          values[i].at[k] = *from;
          inside |= 1u << (i * n + k);
        }
        at.advance(c, 1);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) store<n>(reinterpret_cast<T*>(to + place(i)), values[i]);
    }
    const int shift = slot * kFlags;
    inside_ = (inside_ & ~(kAll << shift)) | inside << shift;
  }

  // change(values, inside, place) of each n that the thread has fetched, in place; inside(k) tells
  // whether the k-th was not null, and `place` is where they lie in the operand.
  template <class Change>
  __device__ __forceinline__ void each(unsigned char* operand, int slot,
                                       const Change& change) const {
    const uint32_t flags = inside_ >> slot * kFlags;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      T* const at = reinterpret_cast<T*>(operand + place(i));
      Vector<T, n> values = load<n>(at);
      change(values, [&](int k) { return flags >> (B::kWide ? i : i * n + k) & 1; }, place(i));
      store<n>(at, values);
    }
  }

 private:
  static constexpr int kFlags = B::kWide ? kCount : kCount * n;  // of a stage
  static_assert(kFlags * B::kStages <= 32);
  static constexpr uint32_t kAll = (uint32_t{1} << kFlags) - 1;

  static __device__ __forceinline__ int place(int i) {
    const int pixel = first_pixel() + i * kApart;
    if constexpr (sizeof(T) == 2)
      return chunk_at<width * 2>(pixel, first_value() / n);
    else
      return value_at<T, width>(pixel, first_value());
  }

  uint32_t inside_ = 0;  // of all stages
};

// The normalisation of `width` values: z = act(x * scale + shift) rounded, or act(x). Scale and
// shift lie in shared memory, and registers are left for sums.
template <class T, int width>
class Normalise {
  using A = Acc<T>;
  static constexpr int n = kVectorBytes / sizeof(T);

 public:
  struct alignas(kVectorBytes) Shared {
    A scale[width], shift[width];
  };
  struct Values {
    Wide<A, n> scale, shift;
    const Conv& c;

    __device__ __forceinline__ A operator()(T x, int k) const {
      A z = widen(x);
      if (c.scale) z = widen(narrow<T>(multiply_add(z, scale.at[k], shift.at[k])));
      return math::activate(z, c.act);
    }
  };

  // Of the positions of the depth from `first` on. A barrier has to follow.
  __device__ __forceinline__ Normalise(const Conv& c, int64_t first, int group, Shared& shared)
      : c_(c), shared_(shared) {
    if (!c.scale || threadIdx.x >= width) return;
    const Depth at(c, first + threadIdx.x);
    const int channel = group * c.group_channels() + at.channel;
    shared.scale[threadIdx.x] = at.ended(c) ? A(1) : static_cast<const A*>(c.scale)[channel];
    shared.shift[threadIdx.x] = at.ended(c) ? A(0) : static_cast<const A*>(c.shift)[channel];
  }

  __device__ __forceinline__ bool changes() const { return c_.scale || c_.act != Act::none; }
  // For n values.
  __device__ __forceinline__ Values from(int value) const {
    Values v{{}, {}, c_};
    if (c_.scale) {
      v.scale = load_channels<n>(shared_.scale + value);
      v.shift = load_channels<n>(shared_.shift + value);
    }
    return v;
  }

 private:
  const Conv& c_;
  const Shared& shared_;
};

// Adds the products of the pixels from `first` to `end`, of which only the last stage may be
// partial. operands.fetch(stage, slot, sources, first pixel) starts the copies of a stage, which
// operands.arrive(stage, slot, first pixel) finds landed, and operands.multiply(stage, slot) finds
// changed by all. All threads have passed a barrier in between.
template <class B, class Operands>
__device__ __forceinline__ void sum_over_pixels(const Conv& c, int64_t first, int64_t end,
                                                unsigned char* memory, Operands& operands) {
  Source* const sources = reinterpret_cast<Source*>(memory + B::kStages * B::kStageBytes);
  if (first >= end) return;
  const int mine = threadIdx.x;
  if (mine < B::kStages * B::kDepth) sources[mine] = source_of(pixel_at(c, first, mine));
  const SourceSteps steps(c, B::kStages * B::kDepth);
  __syncthreads();
  auto stage = [&](int slot) { return memory + slot * B::kStageBytes; };
  auto fetch = [&](int64_t from, int slot) {
    if (from < end) operands.fetch(stage(slot), slot, sources + slot * B::kDepth, from);
    cp_async_commit();
  };
  for (int slot = 0; slot < B::kStages - 1; ++slot) fetch(first + slot * B::kDepth, slot);
  int slot = 0;
  for (int64_t from = first; from < end; from += B::kDepth, slot = (slot + 1) % B::kStages) {
    cp_async_wait<B::kStages - 2>();
    operands.arrive(stage(slot), slot, from);
    __syncthreads();  // the stage is changed, and all have left the one before
    fetch(from + (B::kStages - 1) * B::kDepth, (slot + B::kStages - 1) % B::kStages);
    if (mine / B::kDepth == slot) {
      const int64_t next = from + B::kStages * B::kDepth + mine % B::kDepth;
      sources[mine] = next < c.pixels() ? steps.after(c, sources[mine]) : Source{0, kNowhere, 0};
    }
    operands.multiply(stage(slot), slot);
  }
}

// Adds up what splits have left of kValues values at a time. Threads share out the splits, of which
// there may be hundreds; their sums are added in order.
template <class A>
struct SplitSums {
  static constexpr int kValues = 32, kShares = 8, kThreads = kValues * kShares;
  A shares[kShares][kValues];

  // Calls write(value, sum) for each value below `count`; at(split, value) is what a split has
  // left.
  template <class At, class Write>
  __device__ __forceinline__ void add(int64_t count, int splits, const At& at, const Write& write) {
    const int lane = threadIdx.x % kValues, share = threadIdx.x / kValues;
    for (int64_t first = int64_t{blockIdx.x} * kValues; first < count;
         first += int64_t{gridDim.x} * kValues) {
      const int64_t value = first + lane;
      A sum{};
      if (value < count)
        for (int split = share; split < splits; split += kShares) sum += at(split, value);
      shares[share][lane] = sum;
      __syncthreads();
      if (share == 0 && value < count) {
        for (int other = 1; other < kShares; ++other) sum += shares[other][lane];
        write(value, sum);
      }
      __syncthreads();
    }
  }

  static unsigned blocks(int64_t count) {
    return static_cast<unsigned>(std::min<int64_t>(ceil_div(count, kValues), 1 << 13));
  }
};

}  // namespace fused_resnet::cuda
