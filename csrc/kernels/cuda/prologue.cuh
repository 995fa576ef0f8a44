// What is read of an image as an operand of a product; see Prologue.
#pragma once

#include "../api_chain.h"
#include "../math.h"
#include "vec.cuh"

namespace fused_resnet::cuda {

// Of n adjacent channels.
template <class T, int n>
struct Change {
  using A = Acc<T>;
  Wide<A, n> scale, slope, shift, center;
  Act act;

  __device__ __forceinline__ T operator()(T x, T other, int k) const {
    const A scaled = multiply_add(widen(x), scale.at[k], shift.at[k]);
    const T rounded = narrow<T>(multiply_add(widen(other), slope.at[k], scaled));
    return narrow<T>(math::activate(widen(rounded), act) - widen(narrow<T>(center.at[k])));
  }
};

__device__ __forceinline__ bool changes(const Prologue& in) {
  return in.scale || in.slope || in.shift || in.center || in.act != Act::none;
}

// From `channel` on; a vector of more than one is read at once.
template <class T, int n>
__device__ __forceinline__ Change<T, n> change_at(const Prologue& in, int channel) {
  auto vector = [&](const void* p, Acc<T> otherwise) -> Wide<Acc<T>, n> {
    if (p) return load_channels<n>(static_cast<const Acc<T>*>(p) + channel);
    return each<n>([&](int) { return otherwise; });
  };
  return {vector(in.scale, 1), vector(in.slope, 0), vector(in.shift, 0), vector(in.center, 0),
          in.act};
}

}  // namespace fused_resnet::cuda
