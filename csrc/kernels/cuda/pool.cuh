// What the poolings share.
#pragma once

#include "../math.h"
#include "channels.cuh"

namespace fused_resnet::cuda {

inline View pooled_view(const PoolShape& s) {
  return {s.batch * s.out_height * s.out_width, s.channels, 1};
}

// The gradient that arrives at the maxima, in training.
template <class T>
struct PooledGrad {
  const T* grad;
  const T* out;  // null without relu
  const uint8_t* argmax;

  template <class Args>
  explicit PooledGrad(const Args& args)
      : grad(static_cast<const T*>(args.grad)),
        out(static_cast<const T*>(args.act == Act::relu ? args.out : nullptr)),
        argmax(args.argmax) {}

  template <int n>
  struct Loaded {
    Vector<T, n> grad, out;
    Vector<uint8_t, n> argmax;
  };

  template <int n>
  __device__ __forceinline__ Loaded<n> load(int64_t at) const {
    Loaded<n> loaded;
    loaded.grad = cuda::load<n>(grad + at);
    if (out) loaded.out = cuda::load<n>(out + at);
    loaded.argmax = cuda::load<n>(argmax + at);
    return loaded;
  }

  // What relu let through, of the j-th element.
  template <int n>
  __device__ __forceinline__ Acc<T> gradient(const Loaded<n>& loaded, int j) const {
    const Acc<T> g = widen(loaded.grad.at[j]);
    return out ? math::relu_backward(widen(loaded.out.at[j]), g) : g;
  }
};

}  // namespace fused_resnet::cuda
