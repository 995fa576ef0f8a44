#include "channels.h"

FR_NAMESPACE_BEGIN

namespace {

template <class A>
Status compute(const GramMomentsArgs& args, const Pool& pool) {
  const int64_t channels = args.channels;
  parallel(pool, channels, kMapGrain / (channels + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double* gram = args.gram + i * channels;
      const double mean = args.sum[i] / args.count;
      A* covariance = static_cast<A*>(args.covariance) + i * channels;
      A* moments = static_cast<A*>(args.moments) + i * (channels + 1);
      for (int64_t j = 0; j < channels; ++j) {
        covariance[j] = static_cast<A>(gram[j] - mean * args.sum[j]);
        moments[j] = static_cast<A>(gram[j]);
      }
      moments[channels] = static_cast<A>(args.sum[i]);
    }
  });
  return Status::ok;
}

}  // namespace

Status gram_moments(const GramMomentsArgs& args, const Pool& pool) {
  if (args.dtype == DType::f32) return compute<float>(args, pool);
  return args.dtype == DType::f64 ? compute<double>(args, pool) : Status::unsupported;
}

FR_NAMESPACE_END
