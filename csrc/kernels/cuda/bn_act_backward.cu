#include "bn_gradient.cuh"
#include "masked_grad.cuh"

namespace fused_resnet::cuda {

namespace {

// dx may be grad.
template <class M>
struct BnActBackward {
  using T = typename M::T;
  using A = typename M::A;
  static constexpr int kOperands = MaskedAndX<M>::kOperands;
  template <int n>
  using Loaded = typename MaskedAndX<M>::template Loaded<n>;

  MaskedAndX<M> in;
  BnGradient<A> gradient;
  T* dx;

  BnActBackward(const M& masked, const BnActBackwardArgs& args)
      : in{masked, static_cast<const T*>(args.in.x)},
        gradient(args.in.scale, args.batch),
        dx(static_cast<T*>(args.dx)) {}

  template <class L>
  struct Prepared {
    typename M::template Prepared<L> mask;
    typename BnGradient<A>::template Prepared<L> gradient;
  };

  template <class L>
  __device__ __forceinline__ Prepared<L> prepare(int64_t channel) const {
    return {in.masked.template prepare<L>(channel), gradient.template prepare<L>(channel)};
  }

  template <int n>
  __device__ __forceinline__ Loaded<n> load(int64_t at) const {
    return in.template load<n>(at, gradient.of_batch());
  }

  template <class L>
  __device__ __forceinline__ void apply(const Prepared<L>& p, const Loaded<L::n>& loaded,
                                        int64_t at) const {
    Vector<T, L::n> rounded;
#pragma unroll
    for (int j = 0; j < L::n; ++j) {
      const A g = in.masked.template gradient<L>(p.mask, loaded.mask, j);
      rounded.at[j] =
          narrow<T>(gradient.template operator()<L>(p.gradient, g, widen(loaded.x.at[j]), j));
    }
    store<L::n>(dx + at, rounded);
  }
};

}  // namespace

Status bn_act_backward(const BnActBackwardArgs& args, const Place& place) {
  const MaskedGrad& in = args.in;
  return dispatch(in, [&](auto masked) {
    using M = decltype(masked);
    return map_channels<typename M::T>(in.dtype, view_of(in), {in.grad, in.x, in.out, args.dx},
                                       place, BnActBackward<M>(masked, args));
  });
}

}  // namespace fused_resnet::cuda
