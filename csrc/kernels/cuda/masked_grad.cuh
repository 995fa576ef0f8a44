// The gradient that a forward pass's relu let through, as MaskedGrad of api.h describes it.
#pragma once

#include "../math.h"
#include "channels.cuh"

namespace fused_resnet::cuda {

enum class Mask { none, of_out, of_x };

// The kinds of mask are told apart outside the kernels.
template <class T_, Mask kMask_>
struct Masked {
  using T = T_;
  using A = Acc<T>;
  static constexpr Mask kMask = kMask_;
  static constexpr int kOperands = kMask == Mask::none ? 1 : 2;

  const T* grad;
  const T* other;  // what the mask is made of: out or x
  const A* scale;
  const A* shift;

  explicit Masked(const MaskedGrad& in)
      : grad(static_cast<const T*>(in.grad)),
        other(static_cast<const T*>(kMask == Mask::of_out ? in.out : in.x)),
        scale(static_cast<const A*>(in.scale)),
        shift(static_cast<const A*>(in.shift)) {}

  template <class L>
  struct Prepared {
    PerChannel<A, L> scale, shift;
  };
  template <int n>
  struct Loaded {
    Vector<T, n> grad, other;
  };

  template <class L>
  __device__ __forceinline__ Prepared<L> prepare(int64_t channel) const {
    if constexpr (kMask == Mask::of_x)
      return {per_channel<L>(scale, channel), per_channel<L>(shift, channel)};
    return {};
  }

  template <int n>
  __device__ __forceinline__ Loaded<n> load(int64_t at) const {
    Loaded<n> loaded;
    loaded.grad = cuda::load<n>(grad + at);
    if constexpr (kMask != Mask::none) loaded.other = cuda::load<n>(other + at);
    return loaded;
  }

  // Of the j-th element.
  template <class L>
  __device__ __forceinline__ A gradient(const Prepared<L>& p, const Loaded<L::n>& loaded,
                                        int j) const {
    const A g = widen(loaded.grad.at[j]);
    if constexpr (kMask == Mask::none) return g;
    A y = widen(loaded.other.at[j]);
    // As the stored activation was: rounding can make a positive number zero.
    if constexpr (kMask == Mask::of_x)
      y = widen(narrow<T>(math::scale_shift(y, p.scale[j], p.shift[j])));
    return math::relu_backward(y, g);
  }
};

// The same and x beside it, which the mask may be made of already.
template <class M>
struct MaskedAndX {
  using T = typename M::T;
  static constexpr bool kInMask = M::kMask == Mask::of_x;
  static constexpr int kOperands = M::kOperands + !kInMask;

  M masked;
  const T* x;

  template <int n>
  struct Loaded {
    typename M::template Loaded<n> mask;
    Vector<T, n> x;
  };

  // x is undefined where it is not needed.
  template <int n>
  __device__ __forceinline__ Loaded<n> load(int64_t at, bool needs_x) const {
    Loaded<n> loaded;
    loaded.mask = masked.template load<n>(at);
    if (kInMask)
      loaded.x = loaded.mask.other;
    else if (needs_x)
      loaded.x = cuda::load<n>(x + at);
    return loaded;
  }
};

inline View view_of(const MaskedGrad& in) { return {in.outer, in.channels, in.inner}; }

// Calls f with the Masked that fits.
template <class F>
Status dispatch(const MaskedGrad& in, const F& f) {
  return dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    if (in.act == Act::none) return f(Masked<T, Mask::none>(in));
    if (in.out) return f(Masked<T, Mask::of_out>(in));
    return f(Masked<T, Mask::of_x>(in));
  });
}

}  // namespace fused_resnet::cuda
