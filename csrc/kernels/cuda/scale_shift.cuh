// What every convolution does to its sums first.
#pragma once

#include "conv.cuh"
#include "vec.cuh"

namespace fused_resnet::cuda {

// The scale and shift of `n` adjacent channels.
template <class T, int n>
struct ScaleShift {
  Acc<T> scale[n], shift[n];
  bool shifted;

  __device__ __forceinline__ ScaleShift(const Conv& c, int channel) : shifted(c.shift) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const bool there = channel + k < c.out_channels;
      scale[k] = c.scale && there ? static_cast<const Acc<T>*>(c.scale)[channel + k] : Acc<T>(1);
      shift[k] = shifted && there ? static_cast<const Acc<T>*>(c.shift)[channel + k] : Acc<T>(0);
    }
  }
  // Without a shift -0 stays what it is.
  __device__ __forceinline__ Acc<T> operator()(Acc<T> sum, int k) const {
    return shifted ? multiply_add(sum, scale[k], shift[k]) : sum * scale[k];
  }
};

}  // namespace fused_resnet::cuda
