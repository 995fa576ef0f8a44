#include "../math.h"
#include "channels.cuh"

namespace fused_resnet::cuda {

namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) bn_scale_shift_kernel(const BnScaleShiftArgs args) {
  using A = Acc<T>;
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= args.channels) return;
  auto get = [&](const void* p, A otherwise) {
    return p ? widen(static_cast<const T*>(p)[c]) : otherwise;
  };
  const A scale =
      get(args.weight, A{1}) / math::square_root(get(args.var, A{}) + static_cast<A>(args.eps));
  static_cast<A*>(args.scale)[c] = scale;
  static_cast<A*>(args.shift)[c] = get(args.bias, A{}) - get(args.mean, A{}) * scale;
}

}  // namespace

Status bn_scale_shift(const BnScaleShiftArgs& args, const Place& place) {
  if (args.channels == 0) return Status::ok;
  return dispatch(args.dtype, [&](auto type) {
    return launch(bn_scale_shift_kernel<decltype(type)>, ceil_div(args.channels, kThreads),
                  kThreads, 0, place.stream, args);
  });
}

}  // namespace fused_resnet::cuda
