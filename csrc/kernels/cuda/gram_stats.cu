#include "channels.cuh"
#include "row_sums.cuh"

namespace fused_resnet::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kRowThreads) gram_stats_kernel(const GramStatsArgs args) {
  using A = Acc<T>;
  const int64_t k = blockIdx.x;
  const T* const weight = static_cast<const T*>(args.weight) + k * args.channels;
  const A* const product = static_cast<const A*>(args.product) + k * args.channels;
  const A* const center = static_cast<const A*>(args.center);
  double sums[3][1] = {};  // of squares, about the center, of the center
  sum_row(args.channels, sums, [&](int64_t c, double (&to)[3][1]) {
    const double w = widen(weight[c]);
    to[0][0] += w * product[c];
    to[1][0] += w * args.sum[c];
    to[2][0] += w * center[c];
  });
  if (threadIdx.x > 0) return;
  const double about = sums[1][0] / args.count;
  static_cast<A*>(args.about)[k] = static_cast<A>(about);
  static_cast<A*>(args.mean)[k] = static_cast<A>(about + sums[2][0]);
  // Rounding alone can go below zero; NaN stays.
  static_cast<A*>(args.m2)[k] = static_cast<A>(sums[0][0] < 0 ? 0 : sums[0][0]);
}

}  // namespace

Status gram_stats(const GramStatsArgs& args, const Place& place) {
  if (args.rows == 0) return Status::ok;
  return dispatch(args.dtype, [&](auto type) {
    return launch(gram_stats_kernel<decltype(type)>, static_cast<unsigned>(args.rows), kRowThreads,
                  0, place.stream, args);
  });
}

}  // namespace fused_resnet::cuda
