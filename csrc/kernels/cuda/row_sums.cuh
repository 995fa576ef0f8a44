// Kernels of one block for each row of a small matrix.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace fused_resnet::cuda {

constexpr int kRowThreads = 128;

// The sums over a row's columns of what value(column, sums) adds to each of n numbers, in the first
// thread, in fp64. All threads of the block call it.
template <int n, class F>
__device__ void sum_row(int64_t columns, double (&sums)[n][1], const F& value) {
  for (int64_t c = threadIdx.x; c < columns; c += kRowThreads) value(c, sums);
  combine_lanes<kRowThreads>(
      sums, threadIdx.x, kRowThreads, 0, 1,
      [](double (&mine)[1], const double (&theirs)[1]) { mine[0] += theirs[0]; });
}

}  // namespace fused_resnet::cuda
