#include "channel_sums.cuh"
#include "masked_grad.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class A>
struct Sum : PlainSums<A, 1> {
  A* sum_g;

  explicit Sum(void* sum_g) : sum_g(static_cast<A*>(sum_g)) {}

  __device__ __forceinline__ void emit(int64_t channel, const double (&sums)[1]) const {
    sum_g[channel] = static_cast<A>(sums[0]);
  }
};

template <class T_>
struct ReluBackwardReduce {
  using T = T_;
  using A = Acc<T>;
  using M = Masked<T, Mask::of_out>;
  using Result = Sum<A>;
  static constexpr int kOperands = M::kOperands;

  M masked;
  T* g;
  Result result;

  explicit ReluBackwardReduce(const ReluBackwardReduceArgs& args)
      : masked(args.in), g(static_cast<T*>(args.g)), result(args.sum_g) {}

  template <class L>
  __device__ __forceinline__ auto prepare(int64_t channel, int64_t) const {
    return masked.template prepare<L>(channel);
  }

  template <int n>
  __device__ __forceinline__ auto load(int64_t at) const {
    return masked.template load<n>(at);
  }

  template <class L>
  __device__ __forceinline__ void add(const typename M::template Prepared<L>& p,
                                      const typename M::template Loaded<L::n>& loaded, int64_t at,
                                      A (&sums)[L::n][1]) const {
    Vector<T, L::n> passed;
#pragma unroll
    for (int j = 0; j < L::n; ++j) {
      const A value = masked.template gradient<L>(p, loaded, j);
      passed.at[j] = narrow<T>(value);
      sums[j][0] += value;
    }
    store<L::n>(g + at, passed);
  }
};

}  // namespace

int64_t workspace_bytes(const ReluBackwardReduceArgs& args, const Gpu& gpu) {
  const MaskedGrad& in = args.in;
  return sum_workspace(in.dtype, view_of(in), {in.grad, in.out, args.g}, 1, gpu);
}

Status relu_backward_reduce(const ReluBackwardReduceArgs& args, const Place& place) {
  const MaskedGrad& in = args.in;
  return dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    return sum_channels<T>(in.dtype, view_of(in), {in.grad, in.out, args.g}, place,
                           ReluBackwardReduce<T>(args));
  });
}

}  // namespace fused_resnet::cuda
