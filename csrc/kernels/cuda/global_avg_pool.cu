#include "channels.cuh"
#include "reduce.cuh"

namespace fused_resnet::cuda {

namespace {

// `t` goes over one image; each has t.tiles blocks.
template <class L, class T>
__global__ void __launch_bounds__(Channels::kThreads, 2)
    global_avg_pool_kernel(Traversal t, const T* x, T* out, double pixels) {
  using A = Acc<T>;
  const View& view = t.view;
  const int64_t image = blockIdx.x / t.tiles;
  const int lane = t.lane_of<L>(threadIdx.x), slot = t.slot_of<L>(threadIdx.x);
  const Walk w = t.walk<L>(blockIdx.x % t.tiles, threadIdx.x);
  x += image * view.outer * view.channels * view.inner;
  A sums[L::n] = {};
  follow<kUnroll<1>>(
      w, [&](int64_t at) { return load<L::n>(x + at); },
      [&](const Vector<T, L::n>& v, int64_t) {
#pragma unroll
        for (int j = 0; j < L::n; ++j) sums[j] += widen(v.at[j]);
      });
  double state[L::kChannels][1] = {};
#pragma unroll
  for (int j = 0; j < L::n; ++j) state[j % L::kChannels][0] += sums[j];
  combine_lanes<Channels::kThreads>(
      state, lane, t.lanes, slot, t.slots,
      [](double (&mine)[1], const double (&theirs)[1]) { mine[0] += theirs[0]; });
  if (lane != 0 || w.channel >= view.channels) return;
#pragma unroll
  for (int j = 0; j < L::kChannels; ++j)
    out[image * view.channels + w.channel + j] = narrow<T>(static_cast<A>(state[j][0] / pixels));
}

}  // namespace

Status global_avg_pool(const GlobalAvgPoolArgs& args, const Place& place) {
  if (args.batch * args.channels == 0) return Status::ok;
  // In contiguous tensors every channel of every image is one by itself.
  const bool rows = args.channels_last;
  const View view =
      rows ? View{args.pixels, args.channels, 1} : View{1, args.batch * args.channels, args.pixels};
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const LayoutChoice choice = choose_layout(args.dtype, view, {args.x});
    const Traversal t = one_split(view, choice);
    return with_layout<T>(choice, [&](auto layout) {
      return launch(global_avg_pool_kernel<decltype(layout), T>, t.tiles * (rows ? args.batch : 1),
                    t.threads(), 0, place.stream, t, static_cast<const T*>(args.x),
                    static_cast<T*>(args.out), static_cast<double>(args.pixels));
    });
  });
}

}  // namespace fused_resnet::cuda
