#include "channel_sums.cuh"
#include "masked_grad.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class M>
struct BnActBackwardReduce {
  using T = typename M::T;
  using A = typename M::A;
  using Result = GradientSums<A>;
  static constexpr int kOperands = MaskedAndX<M>::kOperands;
  template <int n>
  using Loaded = typename MaskedAndX<M>::template Loaded<n>;

  MaskedAndX<M> in;
  const A* mean;
  Result result;

  BnActBackwardReduce(const M& masked, const BnActBackwardReduceArgs& args)
      : in{masked, static_cast<const T*>(args.in.x)},
        mean(static_cast<const A*>(args.mean)),
        result(args.invstd, args.sum_g, args.sum_gx) {}

  template <class L>
  struct Prepared {
    typename M::template Prepared<L> mask;
    PerChannel<A, L> mean;
  };

  template <class L>
  __device__ __forceinline__ Prepared<L> prepare(int64_t channel, int64_t) const {
    return {in.masked.template prepare<L>(channel), per_channel<L>(mean, channel)};
  }

  template <int n>
  __device__ __forceinline__ Loaded<n> load(int64_t at) const {
    return in.template load<n>(at, true);
  }

  template <class L>
  __device__ __forceinline__ void add(const Prepared<L>& p, const Loaded<L::n>& loaded, int64_t,
                                      A (&sums)[L::n][2]) const {
#pragma unroll
    for (int j = 0; j < L::n; ++j) {
      const A g = in.masked.template gradient<L>(p.mask, loaded.mask, j);
      sums[j][0] += g;
      sums[j][1] += g * (widen(loaded.x.at[j]) - p.mean[j]);
    }
  }
};

}  // namespace

int64_t workspace_bytes(const BnActBackwardReduceArgs& args, const Gpu& gpu) {
  const MaskedGrad& in = args.in;
  return sum_workspace(in.dtype, view_of(in), {in.grad, in.x, in.out}, 2, gpu);
}

Status bn_act_backward_reduce(const BnActBackwardReduceArgs& args, const Place& place) {
  const MaskedGrad& in = args.in;
  return dispatch(in, [&](auto masked) {
    using M = decltype(masked);
    return sum_channels<typename M::T>(in.dtype, view_of(in), {in.grad, in.x, in.out}, place,
                                       BnActBackwardReduce<M>(masked, args));
  });
}

}  // namespace fused_resnet::cuda
