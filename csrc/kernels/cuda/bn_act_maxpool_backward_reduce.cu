// Over the pooled positions, a quarter as many as the input's in a ResNet: each has one x.
#include "channel_sums.cuh"
#include "pool.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class T>
struct MaxpoolBackwardReduce {
  using A = Acc<T>;
  using Result = GradientSums<A>;
  static constexpr int kOperands = 3;

  PoolShape s;
  int64_t elements;               // of x
  int64_t row_step, column_step;  // between positions of a window
  unsigned by_width;              // to divide a position by the kernel's width: times this, by 2^16
  PooledGrad<T> pooled;
  const T* x;
  const A* mean;
  Result result;

  explicit MaxpoolBackwardReduce(const BnActMaxpoolBackwardReduceArgs& args)
      : s(args.shape),
        elements(s.batch * s.height * s.width * s.channels),
        row_step(s.dilation[0] * s.width * s.channels),
        column_step(s.dilation[1] * s.channels),
        by_width(static_cast<unsigned>(ceil_div(1 << 16, s.kernel[1]))),
        pooled(args),
        x(static_cast<const T*>(args.x)),
        mean(static_cast<const A*>(args.mean)),
        result(args.invstd, args.sum_g, args.sum_gx) {}

  template <int n>
  struct Loaded {
    typename PooledGrad<T>::template Loaded<n> pooled;
    Vector<T, n> x;
  };

  template <class L>
  __device__ __forceinline__ PerChannel<A, L> prepare(int64_t channel, int64_t) const {
    return per_channel<L>(mean, channel);
  }

  template <int n>
  __device__ __forceinline__ Loaded<n> load(int64_t at) const {
    const int64_t pixel = at / s.channels, line = pixel / s.out_width;
    // The window's first position may lie in the padding, what its maximum is at does not.
    const int64_t h = line % s.out_height * s.stride[0] - s.padding[0];
    const int64_t w = pixel % s.out_width * s.stride[1] - s.padding[1];
    const int64_t first =
        ((line / s.out_height * s.height + h) * s.width + w) * s.channels + at % s.channels;
    Loaded<n> loaded;
    loaded.pooled = pooled.template load<n>(at);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const unsigned position = loaded.pooled.argmax.at[j], kh = position * by_width >> 16;
      const unsigned kw = position - kh * static_cast<unsigned>(s.kernel[1]);
      const int64_t from = first + kh * row_step + kw * column_step + j;
      // An argmax that is not of this pooling must not lead out of x.
      loaded.x.at[j] = from >= 0 && from < elements ? x[from] : T{};
    }
    return loaded;
  }

  template <class L>
  __device__ __forceinline__ void add(const PerChannel<A, L>& centre, const Loaded<L::n>& loaded,
                                      int64_t, A (&sums)[L::n][2]) const {
#pragma unroll
    for (int j = 0; j < L::n; ++j) {
      const A g = pooled.gradient(loaded.pooled, j);
      sums[j][0] += g;
      sums[j][1] += g * (widen(loaded.x.at[j]) - centre[j]);
    }
  }
};

}  // namespace

int64_t workspace_bytes(const BnActMaxpoolBackwardReduceArgs& args, const Gpu& gpu) {
  return sum_workspace(args.dtype, pooled_view(args.shape), {args.grad, args.out, args.argmax}, 2,
                       gpu);
}

Status bn_act_maxpool_backward_reduce(const BnActMaxpoolBackwardReduceArgs& args,
                                      const Place& place) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    return sum_channels<T>(args.dtype, pooled_view(args.shape), {args.grad, args.out, args.argmax},
                           place, MaxpoolBackwardReduce<T>(args));
  });
}

}  // namespace fused_resnet::cuda
