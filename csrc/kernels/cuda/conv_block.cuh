// What a block does of a convolution: the tile of output pixels by output channels that it has, the
// products that are summed for it, and how their sums are written. Stages of both operands are
// copied asynchronously into a ring in shared memory while earlier ones are multiplied; afterwards
// the sums go through the same memory, so that whole rows of channels are scaled and written.
#pragma once

#include "../math.h"
#include "conv_load.cuh"
#include "scale_shift.cuh"

namespace fused_resnet::cuda {

template <class T_, class Sums_, int rows, int columns, int stages>
struct Block {
  using T = T_;
  using Sums = Sums_;
  static constexpr int kRows = rows, kColumns = columns, kStages = stages;
  static constexpr int kThreads = Sums::kThreads;
  static constexpr int kStageBytes = (rows + columns) * kRowBytes;
  static constexpr int kBytes = stages * kStageBytes + rows * static_cast<int>(sizeof(Pixel));
  static_assert(kBytes <= 99 << 10);  // what a block may have on sm_86 and sm_120
  static_assert(rows * Sums::kPitch * sizeof(typename Sums::Sum) <= stages * kStageBytes);
};

template <class T>
using SmallBlock = Block<T, TensorSums<T, 64, 64, 2, 2>, 64, 64, 3>;
template <class T>
using LargeBlock = Block<T, TensorSums<T, 128, 128, 2, 4>, 128, 128, 3>;
template <class T, int rows>
using ExactBlock = Block<T, ScalarSums<T, rows, 64>, rows, 64, 3>;

// The tile of a block. Blocks that share pixels are launched together.
struct Tile {
  int64_t row_tile, first_row;
  int group, first_column;  // of the group

  template <class B>
  static __device__ __forceinline__ Tile of(const Conv& c) {
    const unsigned group_tiles = (c.group_out_channels() + B::kColumns - 1) / B::kColumns;
    const unsigned tiles = group_tiles * c.groups, tile = blockIdx.x % tiles;
    const int64_t row_tile = blockIdx.x / tiles;
    return {row_tile, row_tile * B::kRows, static_cast<int>(tile / group_tiles),
            static_cast<int>(tile % group_tiles * B::kColumns)};
  }
  // The first output channel, and how many there are from there on.
  __device__ __forceinline__ int channel(const Conv& c) const {
    return group * c.group_out_channels() + first_column;
  }
  __device__ __forceinline__ int columns(const Conv& c) const {
    return c.group_out_channels() - first_column;
  }
  // Those that share pixels.
  template <class B>
  static int64_t across(const Conv& c) {
    return ceil_div(c.group_out_channels(), B::kColumns) * c.groups;
  }
  template <class B>
  static int64_t count(const Conv& c) {
    return ceil_div(c.pixels(), B::kRows) * across<B>(c);
  }
};

// A ring of as many stages as B has.
template <class B>
struct WholeRing {
  static constexpr int kStages = B::kStages;
  __device__ __forceinline__ int stages() const { return kStages; }
  __device__ __forceinline__ int slot(int stage) const { return stage % kStages; }
  __device__ __forceinline__ int begin(int stage) const { return slot(stage) * B::kStageBytes; }
  __device__ __forceinline__ void wait() const { cp_async_wait<kStages - 2>(); }
};

// Adds the products of the stages from `begin` to `end`. fetch(at, stage's memory, slot) starts the
// copies of a stage, of which arrive(memory, slot) finds those of its own thread landed. All
// threads have passed a barrier in the end.
template <class B, class Ring, class Fetch, class Arrive>
__device__ __forceinline__ void add_products(const Conv& c, int begin, int end,
                                             unsigned char* memory, const Ring& ring,
                                             typename B::Sums& sums, const Fetch& fetch_at,
                                             const Arrive& arrive) {
  constexpr int kDepth = kRowBytes / sizeof(typename B::T);
  Depth at(c, int64_t{begin} * kDepth + threadIdx.x % kRowChunks * (kDepth / kRowChunks));
  auto fetch = [&](int stage) {
    if (stage < end) {
      fetch_at(at, memory + ring.begin(stage - begin), ring.slot(stage - begin));
      at.advance(c, kDepth);
    }
    cp_async_commit();
  };
  for (int stage = begin; stage < begin + ring.stages() - 1; ++stage) fetch(stage);
  for (int stage = begin; stage < end; ++stage) {
    unsigned char* const from = memory + ring.begin(stage - begin);
    ring.wait();
    arrive(from, ring.slot(stage - begin));
    __syncthreads();  // the stage has landed, and all have left the one that is overwritten
    fetch(stage + ring.stages() - 1);
    sums.multiply(from, from + B::kRows * kRowBytes);
  }
  cp_async_wait<0>();
  __syncthreads();
}

// n adjacent elements of the output, from `at` on.
template <class T, int n>
__device__ __forceinline__ void store_values(const Conv& c, int64_t at,
                                             const Vector<T, n>& values) {
  if constexpr (n * sizeof(T) == kVectorBytes)
    store_global<n>(static_cast<T*>(c.out) + at, values);
  else
    store<n>(static_cast<T*>(c.out) + at, values);
}

// Elements of the output in place of the sums that became them.
template <class T, int n>
__device__ __forceinline__ void keep_values(const Vector<T, n>& values, Acc<T>* sums) {
#pragma unroll
  for (int k = 0; k < n; ++k) sums[k] = widen(values.at[k]);
}

// What is done to values before they are rounded, and to what is to be stored: it is. Others have
// of<n>(channel), for n adjacent channels, whose on(pixel) has
//   change(values, at), before values at an element of the output are rounded, and
//   put(c, at, result, sums), where the sums were that became the result.
struct AsTheyAre {
  template <int n>
  __device__ __forceinline__ AsTheyAre of(int) const {
    return {};
  }
  __device__ __forceinline__ AsTheyAre on(const Pixel&) const { return {}; }
  template <class Values>
  __device__ __forceinline__ void change(Values&, int64_t) const {}
  template <class T, int n>
  __device__ __forceinline__ void put(const Conv& c, int64_t at, const Vector<T, n>& result,
                                      Acc<T>*) const {
    store_values(c, at, result);
  }
};

// n adjacent sums of one row of the tile as elements of the output from `at` on, whose channels'
// scale and shift, and whatever comes behind them, are given.
template <class T, int n, class After>
__device__ __forceinline__ void write_values(const Conv& c, Acc<T>* sums, int64_t at,
                                             const ScaleShift<T, n>& scale_shift,
                                             const After& after) {
  Acc<T> values[n];
#pragma unroll
  for (int k = 0; k < n; ++k) values[k] = scale_shift(sums[k], k);
  if (c.residual) {
    const Vector<T, n> added = load<n>(static_cast<const T*>(c.residual) + at);
#pragma unroll
    for (int k = 0; k < n; ++k) values[k] += widen(added.at[k]);
  }
#pragma unroll
  for (int k = 0; k < n; ++k) values[k] = math::activate(values[k], c.act);
  after.change(values, at);
  Vector<T, n> result;
#pragma unroll
  for (int k = 0; k < n; ++k) result.at[k] = narrow<T>(values[k]);
  after.put(c, at, result, sums);
}

// The sums of a tile, in shared memory, at rows of Sums::kPitch.
template <class Sums>
__device__ __forceinline__ void store_sums(const Sums& sums, typename Sums::Sum* to) {
  sums.each([&](int row, int column, const auto& v) {
    store<Sums::kWidth>(to + row * Sums::kPitch + column, v);
  });
}

// The sums of a tile of which `pixels` are known to all threads, over the stages of its depth from
// `begin` to `end`: in shared memory, for all threads.
template <class B, bool wide>
__device__ __forceinline__ typename B::Sums::Sum* sum_products(const Conv& c, const Tile& tile,
                                                               const Pixel* pixels, int begin,
                                                               int end, unsigned char* memory) {
  using T = typename B::T;
  const PixelRows<T, B::kRows, B::kThreads, wide> rows(c, pixels, tile.group);
  const WeightRows<T, B::kColumns, B::kThreads, wide> columns(c, tile.group, tile.first_column);
  typename B::Sums sums;
  add_products<B>(
      c, begin, end, memory, WholeRing<B>{}, sums,
      [&](const Depth& at, unsigned char* to, int) {
        rows.load(c, at, to);
        columns.load(c, at, to + B::kRows * kRowBytes);
      },
      [](unsigned char*, int) {});
  auto* const all = reinterpret_cast<typename B::Sums::Sum*>(memory);
  store_sums(sums, all);
  __syncthreads();
  return all;
}

// Sums over the first `rows` rows of the tile, of the column that each thread is at: each adds up
// some rows, next to each other, and these sums are added in order. `parts` has room for one of
// each thread.
template <class B, class A, class Value>
__device__ __forceinline__ A sum_column(A* parts, int rows, bool there, const Value& value) {
  constexpr int kParts = B::kThreads / B::kColumns, kPartRows = B::kRows / kParts;
  const int part = threadIdx.x / B::kColumns, column = threadIdx.x % B::kColumns;
  A mine{};
  if (there) {
#pragma unroll 4
    for (int row = part * kPartRows; row < (part + 1) * kPartRows; ++row)
      if (row < rows) mine += value(row);
  }
  parts[part * B::kColumns + column] = mine;
  __syncthreads();
  A sum{};
#pragma unroll
  for (int i = 0; i < kParts; ++i) sum += parts[i * B::kColumns + column];
  __syncthreads();
  return sum;
}

// f(row) of every row below `rows` that the thread has of its column.
template <class B, class F>
__device__ __forceinline__ void each_row(int64_t rows, const F& f) {
  static_assert(B::kThreads % B::kColumns == 0);
#pragma unroll 1
  for (int row = threadIdx.x / B::kColumns; row < B::kRows && row < rows;
       row += B::kThreads / B::kColumns)
    f(row);
}

// Writes a tile's sums, `rows` by `columns` of them from `channel` on: 16 bytes of the output at a
// time, or one by one.
template <class B, class Sum, class After>
__device__ __forceinline__ void write_vectors(const Conv& c, const Pixel* pixels, int64_t rows,
                                              int channel, int columns, Sum* sums,
                                              const After& after) {
  using T = typename B::T;
  constexpr int n = kVectorBytes / sizeof(T), kUnits = B::kColumns / n;
  static_assert(B::kThreads % kUnits == 0);  // a thread stays with its channels
  const int column = threadIdx.x % kUnits * n;
  if (column >= columns) return;
  const ScaleShift<T, n> scale_shift(c, channel + column);
  const auto behind = after.template of<n>(channel + column);
  for (int row = threadIdx.x / kUnits; row < B::kRows && row < rows; row += B::kThreads / kUnits)
    write_values<T, n>(c, sums + row * B::Sums::kPitch + column, pixels[row].out + channel + column,
                       scale_shift, behind.on(pixels[row]));
}
template <class B, class Sum, class After>
__device__ __forceinline__ void write_elements(const Conv& c, const Pixel* pixels, int64_t rows,
                                               int channel, int columns, Sum* sums,
                                               const After& after) {
  const int column = threadIdx.x % B::kColumns;
  if (column >= columns) return;
  const ScaleShift<typename B::T, 1> scale_shift(c, channel + column);
  const auto behind = after.template of<1>(channel + column);
  each_row<B>(rows, [&](int row) {
    write_values<typename B::T, 1>(c, sums + row * B::Sums::kPitch + column,
                                   pixels[row].out + channel + column, scale_shift,
                                   behind.on(pixels[row]));
  });
}

// Whether results can be written 16 bytes at a time, as far as the output is concerned.
inline bool writes_vectors(const Conv& c) {
  const int n = kVectorBytes / conv_element_bytes(c.dtype);
  bool vectors =
      vector_aligned(c.out) && vector_aligned(c.residual) && c.group_out_channels() % n == 0;
  for (int64_t step : c.out_stride) vectors = vectors && step % n == 0;
  return vectors;
}

}  // namespace fused_resnet::cuda
