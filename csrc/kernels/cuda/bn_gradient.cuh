// BatchNorm's gradient of its input, as api.h has it at BnActBackwardArgs.
#pragma once

#include "../math.h"
#include "channels.cuh"

namespace fused_resnet::cuda {

template <class A>
struct BnGradient {
  const A* scale;
  const A *mean, *invstd, *sum_g, *sum_gx;
  double count;  // 0 of fixed statistics, which have nothing but the scale

  BnGradient(const void* scale, const BatchSums& batch)
      : scale(static_cast<const A*>(scale)),
        mean(static_cast<const A*>(batch.mean)),
        invstd(static_cast<const A*>(batch.invstd)),
        sum_g(static_cast<const A*>(batch.sum_g)),
        sum_gx(static_cast<const A*>(batch.sum_gx)),
        count(batch.count) {}

  template <class L>
  struct Prepared {
    PerChannel<A, L> scale, mean, slope, offset;
  };

  template <class L>
  __device__ __forceinline__ Prepared<L> prepare(int64_t channel) const {
    Prepared<L> p{};
    p.scale = per_channel<L>(scale, channel);
    if (!of_batch()) return p;
    p.mean = per_channel<L>(mean, channel);
#pragma unroll
    for (int j = 0; j < L::kChannels; ++j) {
      const int64_t c = channel + j;
      const auto terms =
          math::gradient_terms<A>(p.scale.at[j], invstd[c], sum_g[c], sum_gx[c], count);
      p.slope.at[j] = terms.slope;
      p.offset.at[j] = terms.offset;
    }
    return p;
  }

  __device__ __forceinline__ bool of_batch() const { return count != 0; }

  // Of the j-th element; x is not used where statistics are fixed.
  template <class L>
  __device__ __forceinline__ A operator()(const Prepared<L>& p, A g, A x, int j) const {
    const A dx = p.scale[j] * g + p.offset[j];
    return of_batch() ? dx + p.slope[j] * (x - p.mean[j]) : dx;
  }
};

}  // namespace fused_resnet::cuda
