#include "channels.cuh"

namespace fused_resnet::cuda {

namespace {

template <class A>
__global__ void __launch_bounds__(Streaming::kThreads)
    gram_moments_kernel(const GramMomentsArgs args) {
  const int64_t channels = args.channels, columns = channels + 1;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < channels * columns;
       i += step) {
    const int64_t row = i / columns, column = i % columns;
    const double sum = args.sum[row];
    if (column == channels) {
      static_cast<A*>(args.moments)[i] = static_cast<A>(sum);
      continue;
    }
    const double gram = args.gram[row * channels + column];
    static_cast<A*>(args.moments)[i] = static_cast<A>(gram);
    static_cast<A*>(args.covariance)[row * channels + column] =
        static_cast<A>(gram - sum / args.count * args.sum[column]);
  }
}

}  // namespace

Status gram_moments(const GramMomentsArgs& args, const Place& place) {
  if (args.dtype != DType::f32 && args.dtype != DType::f64) return Status::unsupported;
  const int64_t elements = args.channels * (args.channels + 1);
  if (elements == 0) return Status::ok;
  return launch(args.dtype == DType::f32 ? gram_moments_kernel<float> : gram_moments_kernel<double>,
                static_cast<unsigned>(streaming_blocks<double>(elements, place.gpu)),
                Streaming::kThreads, 0, place.stream, args);
}

}  // namespace fused_resnet::cuda
