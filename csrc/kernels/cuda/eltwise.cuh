// What eltwise_act and its gradient share.
#pragma once

#include <type_traits>

#include "launch.h"
#include "vec.cuh"

namespace fused_resnet::cuda {

constexpr int kMaxInputs = 64;  // the pointers travel as a kernel parameter

// Calls process(width, unroll, first, step, vectors), width and unroll being constants, for all
// that this thread has of `numel` elements of T: `unroll` vectors of `width` elements, `step`
// vectors apart, as far as they lie before `vectors`.
template <class T, int n, class F>
__device__ __forceinline__ void for_vectors(int64_t numel, const F& process) {
  constexpr int kUnroll = Streaming::kThreadBytes / sizeof(T) / n;
  constexpr int64_t kBlockVectors = Streaming::kThreads * kUnroll;
  const int64_t vectors = numel / n;
  for (int64_t first = blockIdx.x * kBlockVectors + threadIdx.x; first < vectors;
       first += gridDim.x * kBlockVectors) {
    process(std::integral_constant<int, n>{}, std::integral_constant<int, kUnroll>{}, first,
            int64_t{Streaming::kThreads}, vectors);
  }
  if (n > 1 && blockIdx.x == 0) {  // fewer than n elements are left
    using One = std::integral_constant<int, 1>;
    process(One{}, One{}, vectors * n + threadIdx.x, int64_t{1}, numel);
  }
}

// Calls f with a value of the storage type and the op as a constant.
template <class Args, class F>
Status dispatch_eltwise(const Args& args, const F& f) {
  if (args.count < 1 || args.count > kMaxInputs) return Status::unsupported;
  if (args.numel == 0) return Status::ok;
  return dispatch(args.dtype, [&](auto type) {
    switch (args.op) {
      case EltwiseOp::sum:
        return f(type, std::integral_constant<EltwiseOp, EltwiseOp::sum>{});
      case EltwiseOp::prod:
        return f(type, std::integral_constant<EltwiseOp, EltwiseOp::prod>{});
      case EltwiseOp::max:
        return f(type, std::integral_constant<EltwiseOp, EltwiseOp::max>{});
    }
    return Status::unsupported;
  });
}

}  // namespace fused_resnet::cuda
