#include "../math.h"
#include "channels.cuh"
#include "row_sums.cuh"

namespace fused_resnet::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kRowThreads) gram_gradients_kernel(const GramGradientsArgs args) {
  using A = Acc<T>;
  FR_SHARED(A, slope);
  const int64_t k = blockIdx.x;
  const T* const weight = static_cast<const T*>(args.weight) + k * args.channels;
  const A* const s = static_cast<const A*>(args.s) + k * args.channels;
  auto get = [&](const void* p) -> double { return static_cast<const A*>(p)[k]; };
  double sums[1][1] = {};
  if (args.sum_gx == nullptr)
    sum_row(args.channels, sums, [&](int64_t c, double (&to)[1][1]) {
      to[0][0] += static_cast<double>(widen(weight[c])) * s[c];
    });
  if (threadIdx.x == 0) {
    const double mean = get(args.mean), invstd = get(args.invstd), sum_g = get(args.sum_g);
    const double sum_gx = args.sum_gx ? get(args.sum_gx) : invstd * (sums[0][0] - mean * sum_g);
    static_cast<A*>(args.dgamma)[k] = static_cast<A>(sum_gx);
    const auto terms =
        math::gradient_terms<double>(get(args.scale), invstd, sum_g, sum_gx, args.count);
    slope = static_cast<A>(terms.slope);
    static_cast<A*>(args.slopes)[(k + 1) * (args.channels + 1) - 1] =
        static_cast<A>(terms.offset - terms.slope * mean);
  }
  __syncthreads();
  const A a = static_cast<const A*>(args.scale)[k], b = slope;
  A* const scaled_s = static_cast<A*>(args.scaled_s) + k * args.channels;
  A* const slopes = static_cast<A*>(args.slopes) + k * (args.channels + 1);
  T* const scaled_weight = static_cast<T*>(args.scaled_weight) + k * args.channels;
  for (int64_t c = threadIdx.x; c < args.channels; c += kRowThreads) {
    const A w = widen(weight[c]);
    scaled_s[c] = a * s[c];
    slopes[c] = b * w;
    scaled_weight[c] = narrow<T>(a * w);
  }
}

}  // namespace

Status gram_gradients(const GramGradientsArgs& args, const Place& place) {
  if (args.rows == 0) return Status::ok;
  return dispatch(args.dtype, [&](auto type) {
    return launch(gram_gradients_kernel<decltype(type)>, static_cast<unsigned>(args.rows),
                  kRowThreads, 0, place.stream, args);
  });
}

}  // namespace fused_resnet::cuda
