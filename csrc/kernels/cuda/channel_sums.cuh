// Sums over each channel of a view of [outer, channels, inner]: a thread's own in the type that is
// accumulated in, over few elements, joined in fp64. In one launch where a block reaches all of a
// channel; else splits leave what they have in the workspace, [split][scalar][channel], and a
// second launch joins that, in the order of the splits.
#pragma once

#include "channels.cuh"
#include "reduce.cuh"

namespace fused_resnet::cuda {

// An Op that reduces has, beside what one that maps has but apply,
//   add<L>(prepared, loaded, at, sums), which adds each element's terms to A sums[n][kSums],
//   Result result, what becomes of the sums:
//     A, the type a thread adds them up in, and their number kSums,
//     kScalars, how many fp64 numbers describe part of a channel: describe(prepared, j, sums,
//       count, out) makes them of the sums over `count` elements of the vector's j-th channel,
//       combine(mine, theirs) joins theirs to mine; zeros describe nothing,
//     emit(channel, scalars), which stores a whole channel's result.
// prepare<L>(channel, first) gets the place of the thread's first element too.
template <class L, class Op>
__global__ void __launch_bounds__(Channels::kThreads, 2)
    sum_channels_kernel(Traversal t, Op op, double* partial) {
  using R = typename Op::Result;
  const Walk w = t.walk<L>(blockIdx.x, threadIdx.x);
  double state[L::kChannels][R::kScalars] = {};
  if (w.count * w.repeats > 0) {
    typename R::A sums[L::n][R::kSums] = {};
    const auto prepared = op.template prepare<L>(w.channel, w.at);
    follow<kUnroll<Op::kOperands>>(
        w, [&](int64_t at) { return op.template load<L::n>(at); },
        [&](const auto& loaded, int64_t at) { op.template add<L>(prepared, loaded, at, sums); });
    if constexpr (L::kPlanes) {
#pragma unroll
      for (int i = R::kSums; i < L::n * R::kSums; ++i)
        sums[0][i % R::kSums] += sums[i / R::kSums][i % R::kSums];
    }
    const int64_t count = w.count * w.repeats * (L::kPlanes ? L::n : 1);
#pragma unroll
    for (int j = 0; j < L::kChannels; ++j)
      op.result.describe(prepared, j, sums[j], count, state[j]);
  }
  const int lane = t.lane_of<L>(threadIdx.x), slot = t.slot_of<L>(threadIdx.x);
  combine_lanes<Channels::kThreads>(state, lane, t.lanes, slot, t.slots, R::combine);
  if (lane != 0 || w.channel >= t.view.channels) return;
  const int64_t split = blockIdx.x / t.tiles;
#pragma unroll
  for (int j = 0; j < L::kChannels; ++j) {
    if (!partial) op.result.emit(w.channel + j, state[j]);
#pragma unroll
    for (int i = 0; partial && i < R::kScalars; ++i)
      partial[(split * R::kScalars + i) * t.view.channels + w.channel + j] = state[j][i];
  }
}

constexpr int kFinishThreads = 1024;

template <class R>
__global__ void __launch_bounds__(kFinishThreads)
    finish_channels_kernel(R result, const double* partial, int64_t splits, int64_t channels) {
  constexpr int kSlots = Channels::kFinishChannels;
  const int slot = threadIdx.x % kSlots, lane = threadIdx.x / kSlots, lanes = blockDim.x / kSlots;
  const int64_t channel = int64_t{blockIdx.x} * kSlots + slot;
  double state[1][R::kScalars] = {};
  if (channel < channels) {
#pragma unroll 4
    for (int64_t split = lane; split < splits; split += lanes) {
      double scalars[R::kScalars];
#pragma unroll
      for (int i = 0; i < R::kScalars; ++i)
        scalars[i] = partial[(split * R::kScalars + i) * channels + channel];
      R::combine(state[0], scalars);
    }
  }
  combine_lanes<kFinishThreads>(state, lane, lanes, slot, kSlots, R::combine);
  if (lane == 0 && channel < channels) result.emit(channel, state[0]);
}

// What sum_channels takes of the workspace for an Op of that many scalars.
inline int64_t sum_workspace(DType dtype, const View& view,
                             std::initializer_list<const void*> places, int scalars,
                             const Gpu& gpu) {
  const int64_t splits = reduce_traversal(view, choose_layout(dtype, view, places), gpu).splits();
  return splits == 1 ? 0 : splits * scalars * view.channels * sizeof(double);
}

// Over tensors at `places`.
template <class T, class Op>
Status sum_channels(DType dtype, const View& view, std::initializer_list<const void*> places,
                    const Place& place, const Op& op) {
  if (view.channels == 0) return Status::ok;
  const LayoutChoice choice = choose_layout(dtype, view, places);
  const Traversal t = reduce_traversal(view, choice, place.gpu);
  const int64_t splits = t.splits();
  double* partial = splits == 1 ? nullptr : static_cast<double*>(place.workspace);
  const Status status = with_layout<T>(choice, [&](auto layout) {
    return launch(sum_channels_kernel<decltype(layout), Op>, t.blocks(), t.threads(), 0,
                  place.stream, t, op, partial);
  });
  if (!partial || status != Status::ok) return status;
  constexpr int kSlots = Channels::kFinishChannels;
  const int lanes = power_of_two(splits, kFinishThreads / kSlots);
  return launch(finish_channels_kernel<typename Op::Result>, ceil_div(view.channels, kSlots),
                lanes * kSlots, 0, place.stream, op.result, partial, splits, view.channels);
}

// For Results that are plain sums.
template <class A_, int sums>
struct PlainSums {
  using A = A_;
  static constexpr int kSums = sums, kScalars = sums;

  template <class Prepared>
  __device__ __forceinline__ void describe(const Prepared&, int, const A (&made)[sums], int64_t,
                                           double (&out)[sums]) const {
#pragma unroll
    for (int i = 0; i < sums; ++i) out[i] = made[i];
  }
  static __device__ __forceinline__ void combine(double (&mine)[sums],
                                                 const double (&theirs)[sums]) {
#pragma unroll
    for (int i = 0; i < sums; ++i) mine[i] += theirs[i];
  }
};

// BatchNorm's backward: the sums of g and of g * (x - mean).
template <class A>
struct GradientSums : PlainSums<A, 2> {
  const A* invstd;
  A *sum_g, *sum_gx;

  GradientSums(const void* invstd, void* sum_g, void* sum_gx)
      : invstd(static_cast<const A*>(invstd)),
        sum_g(static_cast<A*>(sum_g)),
        sum_gx(static_cast<A*>(sum_gx)) {}

  __device__ __forceinline__ void emit(int64_t channel, const double (&sums)[2]) const {
    sum_g[channel] = static_cast<A>(sums[0]);
    sum_gx[channel] = static_cast<A>(sums[1] * invstd[channel]);
  }
};

}  // namespace fused_resnet::cuda
