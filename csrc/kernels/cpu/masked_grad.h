// The gradient that a forward pass's relu let through, as MaskedGrad describes it.
#pragma once

#include "../math.h"
#include "channels.h"

FR_NAMESPACE_BEGIN

enum class Mask { none, of_out, of_x };

// The kinds of mask are told apart outside the loops: Masked<T, kind> is a kernel's view of one.
template <class T, Mask kMask>
struct Masked {
  using A = Acc<T>;
  const T* grad;
  const T* x;
  const T* out;
  const A* scale;
  const A* shift;

  explicit Masked(const MaskedGrad& in)
      : grad(static_cast<const T*>(in.grad)),
        x(static_cast<const T*>(in.x)),
        out(static_cast<const T*>(in.out)),
        scale(static_cast<const A*>(in.scale)),
        shift(static_cast<const A*>(in.shift)) {}

  struct Prepared {
    Vec<A> scale, shift;
  };

  template <class Constant>
  FR_LAMBDA Prepared prepare(const Constant& constant) const {
    if constexpr (kMask == Mask::of_x) return {constant(scale), constant(shift)};
    return {Vec<A>{}, Vec<A>{}};
  }

  template <class Lanes>
  FR_LAMBDA Vec<A> operator()(const Prepared& p, int64_t at, Lanes lanes) const {
    const Vec<A> g = load(grad + at, lanes);
    if constexpr (kMask == Mask::of_out) return math::relu_backward(load(out + at, lanes), g);
    // As the stored activation was: rounding can make a positive number zero.
    if constexpr (kMask == Mask::of_x)
      return math::relu_backward(
          rounded<T>(math::scale_shift(load(x + at, lanes), p.scale, p.shift)), g);
    return g;
  }
};

// Calls f with the view of the gradient that fits.
template <class F>
FR_VEC Status dispatch(const MaskedGrad& in, const F& f) {
  return dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    if (in.act == Act::none) return f(type, Masked<T, Mask::none>(in));
    if (in.out) return f(type, Masked<T, Mask::of_out>(in));
    return f(type, Masked<T, Mask::of_x>(in));
  });
}

FR_NAMESPACE_END
