#include "../math.h"
#include "channels.cuh"

namespace fused_resnet::cuda {

namespace {

// `out` may be x or residual.
template <class T>
struct BnAct {
  using A = Acc<T>;
  static constexpr int kOperands = 2;

  const T *x, *residual;
  const A *scale, *shift;
  T* out;
  Act act;

  template <class L>
  struct Prepared {
    PerChannel<A, L> scale, shift;
  };
  template <int n>
  struct Loaded {
    Vector<T, n> x, residual;
  };

  template <class L>
  __device__ __forceinline__ Prepared<L> prepare(int64_t channel) const {
    return {per_channel<L>(scale, channel), per_channel<L>(shift, channel)};
  }

  template <int n>
  __device__ __forceinline__ Loaded<n> load(int64_t at) const {
    Loaded<n> loaded;
    loaded.x = cuda::load<n>(x + at);
    if (residual) loaded.residual = cuda::load<n>(residual + at);
    return loaded;
  }

  template <class L>
  __device__ __forceinline__ void apply(const Prepared<L>& p, const Loaded<L::n>& loaded,
                                        int64_t at) const {
    Vector<T, L::n> rounded;
#pragma unroll
    for (int j = 0; j < L::n; ++j) {
      A y = math::scale_shift(widen(loaded.x.at[j]), p.scale[j], p.shift[j]);
      if (residual) y += widen(loaded.residual.at[j]);
      rounded.at[j] = narrow<T>(math::activate(y, act));
    }
    store<L::n>(out + at, rounded);
  }
};

}  // namespace

Status bn_act(const BnActArgs& args, const Place& place) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const BnAct<T> op{static_cast<const T*>(args.x),     static_cast<const T*>(args.residual),
                      static_cast<const A*>(args.scale), static_cast<const A*>(args.shift),
                      static_cast<T*>(args.out),         args.act};
    return map_channels<T>(args.dtype, {args.outer, args.channels, args.inner},
                           {args.x, args.residual, args.out}, place, op);
  });
}

}  // namespace fused_resnet::cuda
