// The inner loops of matrix products: sums of a block's tile, held in registers, of operands of
// which a stage lies in shared memory. An operand lies by rows, each with its part of the depth
// that is summed over, 128 bytes of it; or by depth, each position with a value for every row.
#pragma once

#include "mma.cuh"
#include "vec.cuh"

namespace fused_resnet::cuda {

constexpr int kRowBytes = 128;
constexpr int kRowChunks = kRowBytes / 16;

// Where a 16-byte chunk of a line of `bytes` bytes lies. Chunks of 8 adjacent lines, which are read
// together, are in different banks, and so are those of one line, which are written together.
template <int bytes = kRowBytes>
__device__ __forceinline__ int chunk_at(int line, int chunk) {
  static_assert(bytes % kRowBytes == 0);
  return line * bytes + (chunk ^ (line & 7)) * 16;
}

// Matrices that lie by depth, of `width` elements: a value is read alone where it has 32 bits and
// goes into a matrix instruction, four depths by eight elements at a time.
template <class T, int width>
__device__ __forceinline__ int value_at(int depth, int i) {
  constexpr int n = 16 / sizeof(T);
  return depth * width * static_cast<int>(sizeof(T)) + (i / n ^ (depth & 3) * 2) * 16 +
         i % n * static_cast<int>(sizeof(T));
}

// sums[row][column] += a[row][:] * b[column][:], by matrix instructions. T is a half type or, as
// tf32, float. Warps lie side by side, kDown x kAcross.
template <class T_, int rows, int columns, int kDown, int kAcross>
struct TensorSums {
  using T = T_;
  using Sum = float;
  static constexpr int kThreads = 32 * kDown * kAcross;
  static constexpr int kWarpRows = rows / kDown, kWarpColumns = columns / kAcross;
  static constexpr int kWidth = 2;            // adjacent columns that a thread has
  static constexpr int kPitch = columns + 8;  // of rows to store to: a half warp uses all banks
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0);

  Sum at[kWarpRows / 16][kWarpColumns / 8][4] = {};
  int lane = threadIdx.x % 32;
  int first_row = threadIdx.x / 32 / kAcross * kWarpRows;
  int first_column = threadIdx.x / 32 % kAcross * kWarpColumns;

  // Of operands that lie by rows.
  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
#pragma unroll
    for (int slice = 0; slice < kRowChunks; slice += 2) {
      multiply_slice(
          [&](uint32_t (&x)[4], int row) {
            ldmatrix_x4<false>(x, a + chunk_at(row + lane % 16, slice + lane / 16));
          },
          [&](uint32_t (&w)[4], int column) {
            ldmatrix_x4<false>(
                w, b + chunk_at(column + lane / 16 * 8 + lane % 8, slice + lane / 8 % 2));
          });
    }
  }

  // Of operands that lie by depth, `depth` of it.
  template <int depth>
  __device__ __forceinline__ void multiply_by_depth(const unsigned char* a,
                                                    const unsigned char* b) {
    constexpr int kSlice = 32 / sizeof(T), kRowsBytes = rows * sizeof(T);
    constexpr int kColumnsBytes = columns * sizeof(T);
    static_assert(depth % kSlice == 0);
#pragma unroll
    for (int slice = 0; slice < depth; slice += kSlice) {
      multiply_slice(
          [&](uint32_t (&x)[4], int row) {
            if constexpr (sizeof(T) == 2) {
              ldmatrix_x4<true>(x, a + chunk_at<kRowsBytes>(slice + lane / 16 * 8 + lane % 8,
                                                            row / 8 + lane / 8 % 2));
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i)
                x[i] = *reinterpret_cast<const uint32_t*>(
                    a +
                    value_at<T, rows>(slice + lane % 4 + i / 2 * 4, row + lane / 4 + i % 2 * 8));
            }
          },
          [&](uint32_t (&w)[4], int column) {
            if constexpr (sizeof(T) == 2) {
              ldmatrix_x4<true>(w, b + chunk_at<kColumnsBytes>(slice + lane / 8 % 2 * 8 + lane % 8,
                                                               column / 8 + lane / 16));
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i)
                w[i] = *reinterpret_cast<const uint32_t*>(
                    b + value_at<T, columns>(slice + lane % 4 + i % 2 * 4,
                                             column + lane / 4 + i / 2 * 8));
            }
          });
    }
  }

  // f(row, column, kWidth sums from there on).
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(first_row + i * 16 + half * 8 + lane / 4, first_column + j * 8 + lane % 4 * 2,
            Vector<Sum, 2>{{at[i][j][half * 2], at[i][j][half * 2 + 1]}});
      }
    }
  }

 private:
  // 32 bytes of the depth, of which the functions load 16 rows or columns.
  template <class Rows, class Columns>
  __device__ __forceinline__ void multiply_slice(const Rows& load_rows,
                                                 const Columns& load_columns) {
    uint32_t x[kWarpRows / 16][4], w[kWarpColumns / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
      load_rows(x[i], first_row + i * 16);
      round(x[i]);
    }
#pragma unroll
    for (int j = 0; j < kWarpColumns / 16; ++j) {
      load_columns(w[j], first_column + j * 16);
      round(w[j]);
    }
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
        const uint32_t pair[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
        if constexpr (sizeof(T) == 2)
          mma_m16n8k16<T>(at[i][j], x[i], pair);
        else
          mma_m16n8k8(at[i][j], x[i], pair);
      }
    }
  }

  __device__ __forceinline__ void round(uint32_t (&r)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = to_tf32(r[i]);
    }
  }
};

// The same by single products, in T itself: float or double. Where operands lie by rows, threads
// take every sixteenth row and column, so that each reads another bank; where they lie by depth,
// 16 bytes of adjacent ones.
template <class T_, int rows, int columns, bool by_depth = false>
struct ScalarSums {
  using T = T_;
  using Sum = T;
  static constexpr int kAcross = 16, kDown = 16;
  static constexpr int kThreads = kDown * kAcross;
  static constexpr int n = 16 / sizeof(T), kWidth = by_depth ? n : 1;
  static constexpr int kPitch = columns;
  static constexpr int kMine = rows / kDown, kMineAcross = columns / kAcross;
  static_assert(kMine % kWidth == 0 && kMineAcross % kWidth == 0);

  Sum at[kMine][kMineAcross] = {};
  int first_row = threadIdx.x / kAcross * kWidth, first_column = threadIdx.x % kAcross * kWidth;

  static __device__ __forceinline__ int step(int i) {
    return i / kWidth * 16 * kWidth + i % kWidth;
  }

  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
#pragma unroll 1
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
      Vector<T, n> x[kMine], w[kMineAcross];
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        x[i] = load<n>(reinterpret_cast<const T*>(a + chunk_at(first_row + step(i), chunk)));
#pragma unroll
      for (int j = 0; j < kMineAcross; ++j)
        w[j] = load<n>(reinterpret_cast<const T*>(b + chunk_at(first_column + step(j), chunk)));
#pragma unroll
      for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
#pragma unroll
          for (int j = 0; j < kMineAcross; ++j)
            at[i][j] = multiply_add(x[i].at[k], w[j].at[k], at[i][j]);
        }
      }
    }
  }

  template <int depth>
  __device__ __forceinline__ void multiply_by_depth(const unsigned char* a,
                                                    const unsigned char* b) {
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      Vector<T, n> x[kMine / n], w[kMineAcross / n];
#pragma unroll
      for (int i = 0; i < kMine; i += n)
        x[i / n] =
            load<n>(reinterpret_cast<const T*>(a + value_at<T, rows>(k, first_row + step(i))));
#pragma unroll
      for (int j = 0; j < kMineAcross; j += n)
        w[j / n] = load<n>(
            reinterpret_cast<const T*>(b + value_at<T, columns>(k, first_column + step(j))));
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
#pragma unroll
        for (int j = 0; j < kMineAcross; ++j)
          at[i][j] = multiply_add(x[i / n].at[i % n], w[j / n].at[j % n], at[i][j]);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int j = 0; j < kMineAcross; j += kWidth) {
        Vector<Sum, kWidth> sums;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sums.at[k] = at[i][j + k];
        f(first_row + step(i), first_column + step(j), sums);
      }
    }
  }
};

}  // namespace fused_resnet::cuda
