// Checks the emulator itself: a kernel that uses all it has, whole or with one bug planted. Which
// bugs the orders and the sanitizer must catch, the test says.
#include <map>
#include <vector>

#include "../../csrc/kernels/cuda/launch.h"
#include "check.h"

namespace {

enum class Bug {
  none,
  no_barrier_after_write,   // sums are read before other warps wrote them
  no_barrier_before_reuse,  // sums are overwritten before other warps read them
  no_warp_barrier,          // staged values are read before other lanes wrote them
  divergent_barrier,        // two halves of the block wait at different barriers
  divergent_shuffle,        // two halves of a warp wait at different shuffles
  early_return,             // a thread leaves before a barrier
  shared_out_of_bounds,     // a store behind a shared array
  dynamic_out_of_bounds,    // a store behind the shared memory of the launch
  global_out_of_bounds,     // a store behind the output
};

constexpr int kThreads = 96, kWarps = kThreads / 32, kRounds = 3;

__device__ float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

// out[block][round][thread] = the sum of in[block][round], which every thread computes from the
// sums of the warps. Within a warp, values go through shared memory to the opposite lane first.
__global__ void block_sum(const float* in, float* out, Bug bug) {
  using Sums = float[kWarps];
  FR_SHARED(Sums, sums);
  FR_DYNAMIC_SHARED(dynamic);
  float* staged = reinterpret_cast<float*>(dynamic);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int round = 0; round < kRounds; ++round) {
    const int row = (blockIdx.x * kRounds + round) * kThreads;
    if (bug == Bug::early_return && thread == 5) return;
    staged[thread + (bug == Bug::dynamic_out_of_bounds ? 1 : 0)] = in[row + thread];
    if (bug != Bug::no_warp_barrier) __syncwarp();
    const float opposite = staged[warp * 32 + 31 - lane];
    float sum;
    if (bug == Bug::divergent_shuffle && lane < 16) {
      sum = warp_sum(opposite) + __shfl_sync(~0u, 0.0f, 0);
    } else {
      sum = warp_sum(opposite);
    }
    if (lane == 0) sums[warp + (bug == Bug::shared_out_of_bounds ? 1 : 0)] = sum;
    if (bug == Bug::divergent_barrier && warp == 1) {
      __syncthreads();
    } else if (bug != Bug::no_barrier_after_write) {
      __syncthreads();
    }
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w];
    out[row + thread + (bug == Bug::global_out_of_bounds ? 1 : 0)] = total;
    if (bug != Bug::no_barrier_before_reuse) __syncthreads();
  }
}

void check_block_sum(Bug bug) {
  constexpr int kBlocks = 2, kRows = kBlocks * kRounds;
  std::vector<float> in(kRows * kThreads), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = i % 17 + i / 100;  // sums are exact in float
  fused_resnet::cuda::launch(block_sum, kBlocks, kThreads, kThreads * sizeof(float), nullptr,
                             in.data(), out.data(), bug);
  for (int row = 0; row < kRows; ++row) {
    float expected = 0;
    for (int i = 0; i < kThreads; ++i) expected += in[row * kThreads + i];
    for (int i = 0; i < kThreads; ++i) check(out[row * kThreads + i] == expected, "block_sum");
  }
}

// out[shuffle][thread] for each kind of shuffle in groups of `width`, in a block with a smaller
// last warp.
__global__ void shuffles(double* out, int width) {
  const int thread = threadIdx.x, threads = blockDim.x;
  const double x = thread;
  out[thread] = __shfl_sync(~0u, x, 3, width);
  out[threads + thread] = __shfl_up_sync(~0u, x, 2, width);
  out[2 * threads + thread] = __shfl_down_sync(~0u, x, 2, width);
  out[3 * threads + thread] = __shfl_xor_sync(~0u, x, 1, width);
  if (thread % 2 == 0) out[4 * threads + thread] = __shfl_xor_sync(0x55555555u, x, 2, width);
}

void check_shuffles() {
  constexpr int kCount = 40;
  for (int width : {4, 8}) {
    std::vector<double> out(5 * kCount, -1);
    fused_resnet::cuda::launch(shuffles, 1, kCount, 0, nullptr, out.data(), width);
    for (int i = 0; i < kCount; ++i) {
      const int in_group = i % width, first = i - in_group;
      const double expected[] = {
          first + 3.0,
          in_group >= 2 ? i - 2.0 : i,
          in_group + 2 < width ? i + 2.0 : i,
          i % 2 ? i - 1.0 : i + 1.0,
          i % 2 ? -1.0 : i ^ 2,
      };
      for (int kind = 0; kind < 5; ++kind)
        check(out[kind * kCount + i] == expected[kind], "shuffles");
    }
  }
}

// any[round][thread] = whether a thread has the number of the round; the last has none.
__global__ void any_of_block(int* any) {
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int round = 0; round <= threads; ++round)
    any[round * threads + thread] = __syncthreads_or(thread == round);
}

void check_any_of_block() {
  constexpr int kCount = 40;
  std::vector<int> any((kCount + 1) * kCount, -1);
  fused_resnet::cuda::launch(any_of_block, 1, kCount, 0, nullptr, any.data());
  for (int i = 0; i < (kCount + 1) * kCount; ++i)
    check(any[i] == (i < kCount * kCount), "__syncthreads_or");
}

// Every thread of a three-dimensional launch writes its own linear index.
__global__ void indices(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  out[i] = i;
}

void check_indices() {
  const dim3 grid(2, 3, 4), block(5, 2, 3);
  std::vector<unsigned> out(24 * 30, ~0u);
  fused_resnet::cuda::launch(indices, grid, block, 0, nullptr, out.data());
  for (size_t i = 0; i < out.size(); ++i) check(out[i] == i, "indices");
}

}  // namespace

void check_shim(int argc, char** argv) {
  const std::map<std::string, Bug> bugs = {
      {"none", Bug::none},
      {"no_barrier_after_write", Bug::no_barrier_after_write},
      {"no_barrier_before_reuse", Bug::no_barrier_before_reuse},
      {"no_warp_barrier", Bug::no_warp_barrier},
      {"divergent_barrier", Bug::divergent_barrier},
      {"divergent_shuffle", Bug::divergent_shuffle},
      {"early_return", Bug::early_return},
      {"shared_out_of_bounds", Bug::shared_out_of_bounds},
      {"dynamic_out_of_bounds", Bug::dynamic_out_of_bounds},
      {"global_out_of_bounds", Bug::global_out_of_bounds},
  };
  check(argc == 1 && bugs.count(argv[0]), "expected the name of a bug to plant, or none");
  check_block_sum(bugs.at(argv[0]));
  check_shuffles();
  check_any_of_block();
  check_indices();
}
