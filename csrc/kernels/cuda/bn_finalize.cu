#include "../math.h"
#include "channels.cuh"

namespace fused_resnet::cuda {

namespace {

constexpr int kThreads = 128;

template <class R>
__device__ __forceinline__ void update(void* running, int64_t c, double value, double momentum) {
  R* at = static_cast<R*>(running) + c;
  *at = narrow<R>(static_cast<Acc<R>>(math::running_average(widen(*at), value, momentum)));
}

// In fp64: a few thousand numbers at most.
template <class A, class R>
__global__ void __launch_bounds__(kThreads) bn_finalize_kernel(const BnFinalizeArgs args) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= args.channels) return;
  auto get = [&](const void* p, double otherwise) {
    return p ? static_cast<double>(static_cast<const A*>(p)[c]) : otherwise;
  };
  const double mean = get(args.mean, 0), m2 = get(args.m2, 0);
  const auto made = math::normalization<A>(mean, m2, args.count, get(args.weight, 1),
                                           get(args.bias, 0), args.eps);
  static_cast<A*>(args.scale)[c] = made.scale;
  static_cast<A*>(args.shift)[c] = made.shift;
  static_cast<A*>(args.invstd)[c] = made.invstd;
  if (!args.running_mean || args.count == 0) return;
  update<R>(args.running_mean, c, mean, args.momentum);
  update<R>(args.running_var, c, m2 / (args.count - 1), args.momentum);
}

}  // namespace

Status bn_finalize(const BnFinalizeArgs& args, const Place& place) {
  if (args.dtype != DType::f32 && args.dtype != DType::f64) return Status::unsupported;
  if (args.channels == 0) return Status::ok;
  return dispatch(args.running_dtype, [&](auto type) {
    using R = decltype(type);
    return launch(
        args.dtype == DType::f32 ? bn_finalize_kernel<float, R> : bn_finalize_kernel<double, R>,
        ceil_div(args.channels, kThreads), kThreads, 0, place.stream, args);
  });
}

}  // namespace fused_resnet::cuda
